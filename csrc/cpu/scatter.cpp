// The dense gradient: zeros, and upstream * entry gradient at the support, rounded once. Or the
// entries are added to a given gradient.
//
// Bytes: each row is written once. Only the K entries are touched if the memory is zero already, as
// fresh pages from the system are, or is added to. A background reads the student's row once.

#include <cmath>
#include <cstring>

#include "../common/softmax.h"
#include "kernels.h"
#include "parallel.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace opd::cpu {
namespace {

// Writes zeros past the cache. A row is as large as L2, and fetching lines only to overwrite them
// would double the traffic.
void stream_zeros(char* out, size_t bytes) {
#if defined(__SSE2__)
  constexpr size_t kLine = 64, kWorthStreaming = 1 << 14;
  if (bytes >= kWorthStreaming) {
    const size_t head = (kLine - reinterpret_cast<uintptr_t>(out) % kLine) % kLine;
    memset(out, 0, head);
    out += head;
    bytes -= head;
    for (; bytes >= kLine; out += kLine, bytes -= kLine)
      for (size_t i = 0; i < kLine; i += sizeof(__m128i))
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), _mm_setzero_si128());
    _mm_sfence();
  }
#endif
  memset(out, 0, bytes);
}

template <class Format>
void write_entries(const ScatterArgs& args, int64_t row) {
  auto* out = reinterpret_cast<typename Format::Bits*>(args.out.row(row));
  const int32_t* ids = args.ids + row * args.k;
  const float* grad = args.entry_grad + row * args.k;
  const float upstream = args.upstream[row];
  for (int i = 0; i < args.k; ++i) {
    if (ids[i] < 0 || ids[i] >= args.out.width) continue;
    float value = upstream * grad[i];
    if (args.mode == ScatterMode::kAdd) value += Format::widen(out[ids[i]]);
    out[ids[i]] = Format::round(value);
  }
}

void write_row_entries(const ScatterArgs& args, int64_t row) {
  switch (args.out.dtype) {
    case DType::kFloat32: return write_entries<Float32>(args, row);
    case DType::kFloat16: return write_entries<Float16>(args, row);
    default: return write_entries<BFloat16>(args, row);
  }
}

}  // namespace

void scatter(const ScatterArgs& args, const Processor& processor) {
  const bool clear = args.mode == ScatterMode::kClear;
  const size_t row_bytes = args.out.width * element_size(args.out.dtype);
  for_each_row(args.out.count, clear ? args.out.width : args.k, processor.threads, 0,
               [&](int64_t row, void*) {
                 if (clear) stream_zeros(args.out.row(row), row_bytes);
                 write_row_entries(args, row);
               });
}

void scatter_background(const BackgroundArgs& args, const Processor& processor) {
  const ScatterArgs& to = args.scatter;
  const bool clear = to.mode == ScatterMode::kClear;
  const int64_t size = element_size(to.out.dtype);
  const BackgroundRow write = processor.kernels->of(to.out.dtype).background;
  for_each_row(to.out.count, to.out.width, processor.threads, 0, [&](int64_t row, void*) {
    char* out = to.out.row(row);
    const float upstream = to.upstream[row], factor = args.factors[row];
    int64_t written = 0;
    if (has_background(upstream, factor)) {
      written = args.limit;
      write(args.logits.row(row), written,
            softmax_of(upstream, factor, args.logsumexp[row], args.temperature.at(row)), out);
    }
    if (clear) stream_zeros(out + written * size, (to.out.width - written) * size);
    write_row_entries(to, row);
  });
}

}  // namespace opd::cpu
