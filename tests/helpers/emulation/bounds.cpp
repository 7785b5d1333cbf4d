// Prints the bounds of the k-th largest key that a block starts to bisect with: threads and k are
// arguments, 16-bit keys, whole vectors of them, come by standard input.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "divergence.cuh"

using namespace opd::cuda;

int main(int count, char** words) {
  if (count != 3) return 2;
  const int threads = std::atoi(words[1]), k = std::atoi(words[2]);
  std::vector<int16_t> keys;
  for (int key; std::scanf("%d", &key) == 1;) keys.push_back(static_cast<int16_t>(key));
  const int vectors = static_cast<int>(keys.size()) / KeyVector<int16_t>::kKeys;
  const int bytes = vectors * kChunkBytes;
  int low = 0, high = 0;
  emulation::run({1, 1}, threads, bytes + Block::kScratchBytes, 1, [&] {
    auto* shared = reinterpret_cast<int16_t*>(shared_memory());
    if (threadIdx.x == 0) memcpy(shared, keys.data(), static_cast<size_t>(bytes));
    __syncthreads();
    Block block(shared_memory() + bytes);
    int of_thread, most;
    key_range(block, shared, vectors, k, of_thread, most);
    if (threadIdx.x == 0) low = of_thread, high = most;
  });
  std::printf("%d %d\n", low, high);
}
