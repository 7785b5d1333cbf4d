// Distributes rows over OpenMP threads; each thread allocates its scratch once.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>

#include "select.h"

namespace opd::cpu {

struct FreeAligned {
  void operator()(void* memory) const { std::free(memory); }
};
using Scratch = std::unique_ptr<void, FreeAligned>;

inline Scratch make_scratch(size_t bytes) {
  void* memory = std::aligned_alloc(kScratchAlignment, round_up(bytes + 1, kScratchAlignment));
  if (!memory) throw std::bad_alloc();
  return Scratch(memory);
}

// Calls body(row, scratch) for every row. `elements_per_row` keeps small work on few threads:
// waking one takes as long as about 2^15 elements.
template <class Body>
void for_each_row(int64_t rows, int64_t elements_per_row, int threads, size_t scratch_bytes,
                  const Body& body) {
  constexpr int64_t kWorthAThread = 1 << 15;
  const int64_t useful = rows * elements_per_row / kWorthAThread;
  const int team = static_cast<int>(useful < 1 ? 1 : useful < threads ? useful : threads);
  std::exception_ptr failure;  // an exception must not leave the parallel region
#pragma omp parallel num_threads(team)
  {
    Scratch scratch;
    bool ready = true;
    try {
      scratch = make_scratch(scratch_bytes);
    } catch (...) {
      ready = false;
#pragma omp critical
      failure = std::current_exception();
    }
#pragma omp for schedule(guided)
    for (int64_t row = 0; row < rows; ++row)
      if (ready) body(row, scratch.get());
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace opd::cpu
