// The log-sum-exp of what lies outside of a row's support and the entropy of its own softmax, in
// the one read of the row, in which the support may be selected as well.
//
// A tail may hold 1e-9 of the mass, so it is summed directly. The pass that leaves group keys for
// the selection leaves for each of the tail's own groups, 64 elements or more, its maximum m, its
// sum of exp((x - m) / T) and, for the entropy, that of exp((x - m) / T) (x - m). The groups with
// an id of the support are read again and summed without these ids. Then all groups are combined
// relative to the largest maximum that is left, in double, by the same 128 threads of any block.
// The groups depend on width and dtype alone where a row begins at a multiple of 16 bytes, and so do
// the bits; elsewhere also on where in 16 bytes it begins.
//
// A block or a cluster serves a row, as in the selection. Rows of more than 4096 tiles are summed by
// several launches, whose results are joined. Their selection, and one that does not fit into shared
// memory beside the sums, has a read of its own: 1024 ids of 262144 elements of float32, for example.
//
// Bytes: V elements, and a second time a group for each id of the support: 2.7 % of a row of 151936
// at 64 ids of 16 bits. There a block has 26 kB of shared memory, 35 kB with the entropy. The
// streaming loop has 376 instructions for a lane's 32 elements on sm_90, 12 an element, and 15 with
// the entropy; 5 and 7 of them are the element's own.
#pragma once

#include <cfloat>

#include "../common/divergence.h"
#include "select.cuh"

namespace opd::cuda {

// Rows are cut from a multiple of 16 bytes on, so that equal rows have equal groups. That a group may
// lie in one more line of the cache counts where it is read again.
constexpr int kTailAlignment = kChunkBytes;

// Sums of a row's groups in shared memory.
template <class ItsRow, bool kEntropy>
class GroupSums {
 public:
  using Row = ItsRow;
  using Format = typename Row::Format;
  using Bits = typename Row::Bits;
  static constexpr bool kSums = true;
  static constexpr int kAlign = kTailAlignment;
  // Fewer than where keys alone are wanted: sums need registers, and time in which others load.
  static constexpr int kTilesAtOnce = 4;

  __device__ GroupSums(const Row& row, float temperature, const TailPlan& plan, char* memory)
      : row(row),
        first(plan.first),
        lane_bits_(plan.lane_bits),
        groups_(plan.groups),
        sums_(reinterpret_cast<float*>(memory)) {
    // Finite, and so is what is least.
    constexpr float kLog2E = 1.44269504f, kLeastFactor = 127 / FLT_MAX * 1.001f;
    factor_ = fminf(fmaxf(kLog2E / temperature, kLeastFactor), FLT_MAX);
    least_ = -127 / factor_;
  }

  const Row row;    // as wide as the tail
  const int first;  // tile of the segment

  // The segment ends before this tile.
  __device__ int last() const { return min(row.tiles(), first + kSegmentTiles); }

  // The same groups with their sums in other memory.
  __device__ GroupSums in(char* memory) const {
    GroupSums other = *this;
    other.sums_ = reinterpret_cast<float*>(memory);
    return other;
  }

  // Adds up the groups of the first `count` of these tiles. The maxima are those of groups of
  // 2^lane_bits lanes. Lane i of a group ends with the sums of tile i.
  __device__ void add(const Block& block, int tile, int count, int lane_bits,
                      const uint4 (&chunks)[kTilesAtOnce],
                      ChunkMaxima<Format, kTilesAtOnce>& maxima) const {
#pragma unroll 1  // usually one
    for (int bit = lane_bits; bit < lane_bits_; ++bit)
      for (uint32_t& word : maxima.words)
        word = word_max<Format>(word, __shfl_xor_sync(kAllLanes, word, 1 << bit));
    for (uint32_t& word : maxima.words) word = word_max<Format>(word, kLowest);
    float sums[kTilesAtOnce], moments[kTilesAtOnce];
#pragma unroll
    for (int i = 0; i < kTilesAtOnce; ++i) {
      const float most = word_value(maxima.words[i / kOfWord], i % kOfWord, Format{});
      sum_chunk(chunks[i], most, sums[i], moments[i]);
    }
    const float sum = of_own_tile(sums, block.lane);
    float moment = 0;
    if constexpr (kEntropy) moment = of_own_tile(moments, block.lane);
    const int i = block.lane % kTilesAtOnce;
    if ((block.lane & (of_group() - 1)) < kTilesAtOnce && i < count)
      write((tile + i) * kWarp + block.lane, maxima.bits(i), sum, moment);
  }

  // The tile that the row's begin or end cuts, for one warp of the cluster's first block or last;
  // -1 for the others.
  __device__ int cut_tile(const Block& block) const {
    const bool first_is_cut = first == 0 && row.whole_begin() > 0;
    if (first_is_cut && cluster_rank() == 0 && block.warp == 0) return 0;
    const int cut_at_end = row.whole_end();
    const bool is_cut =
        cut_at_end >= first && cut_at_end < last() && !(first_is_cut && cut_at_end == 0);
    const bool of_last = cluster_rank() == cluster_size() - 1 && block.warp == block.warps - 1;
    return is_cut && of_last ? cut_at_end : -1;
  }

  __device__ void add_cut_tile(const Block& block, int tile) const {
    const int chunk = tile * kWarp + block.lane;
    uint4 loaded{};
    if (row.is_whole(chunk)) loaded = row.load_whole(chunk);
    sum_group(block, chunk, loaded, row.excluded(chunk));
  }

  // What `leave_out` takes of an id: ranks of different entries differ, and those of ids that the
  // tail does not have come last.
  __device__ uint64_t rank_of(int64_t id, int entry) const {
    const bool has = id >= 0 && id < row.width();
    const auto high = has ? 1 + static_cast<uint32_t>(row.place_of(static_cast<int>(id))) : 0;
    return static_cast<uint64_t>(high) << 32 | static_cast<uint32_t>(entry);
  }

  // Sums the groups with listed ids again, without these. The ranks are in descending order.
  __device__ void leave_out(const Block& block, const uint64_t* ranks, int count) const {
    constexpr int kChunksAtOnce = Row::Tuning::kChunksAtOnce;
    const int of_warp = kWarp >> lane_bits_, stride = block.warps * of_warp;
    for (int start = block.warp * of_warp; start < count;) {
      uint4 loaded[kChunksAtOnce];
      const int entry = start + (block.lane >> lane_bits_);
#pragma unroll
      for (int j = 0; j < kChunksAtOnce; ++j) {
        loaded[j] = uint4{};
        const int chunk = chunk_of_first(block, ranks, entry + j * stride, count);
        if (row.is_whole(chunk)) loaded[j] = row.load_whole(chunk);
      }
#pragma unroll 1  // one copy of the body; the next chunk moves to loaded[0]
      for (int j = 0; j < kChunksAtOnce && start < count; ++j, start += stride) {
        const int which = start + (block.lane >> lane_bits_);
        const int chunk = chunk_of_first(block, ranks, which, count);
        unsigned excluded = Row::kAll;
        if (chunk >= 0) {
          excluded = row.excluded(chunk);
          const int group = chunk >> lane_bits_;
          for (int i = which; i < count && group_of(ranks[i]) == group; ++i)
            if (static_cast<int>(place_of(ranks[i]) / Row::kChunk) == chunk)
              excluded |= 1u << place_of(ranks[i]) % Row::kChunk;
        }
        sum_group(block, chunk, loaded[0], excluded);
        for (int next = 1; next < kChunksAtOnce; ++next) loaded[next - 1] = loaded[next];
      }
    }
  }

  // Calls write(log-sum-exp, entropy) on one thread. Groups are added in an order that does not
  // depend on the number of threads.
  template <class Write>
  __device__ void combine(Block& block, float temperature, const Write& write) const {
    const int count = (last() - first) << (kLaneBits - lane_bits_);
    float most = -FLT_MAX;
    block.for_entries(count, [&](int i) { most = larger(most, maximum(i)); });
    most = block.combine(most, [](float a, float b) { return larger(a, b); });
    Sums sums{0, 0};
    block.for_entries(count, [&](int i) {
      const float below = maximum(i) - most, weight = power_of_2(below * factor_);
      const double sum = sums_[i];
      sums.sum += sum * weight;
      // A group of weight 0 counts as near as one can be that has this weight.
      if constexpr (kEntropy)
        sums.moment += (moments()[i] + sum * at_least(below, least_)) * weight;
    });
    sums = block.combine(sums, [](const Sums& a, const Sums& b) {
      return Sums{a.sum + b.sum, a.moment + b.moment};
    });
    if (block.thread > 0) return;
    const double log_sum = log(sums.sum);
    // Both terms of the entropy are 0 or more.
    write(most / static_cast<double>(temperature) + log_sum,
          sums.sum == 0 ? 0 : log_sum - sums.moment / (sums.sum * temperature));
  }

 private:
  struct Sums {
    double sum, moment;
  };

  static constexpr int kOfWord = sizeof(uint32_t) / sizeof(Bits);
  // A group of -inf alone has this maximum, and sums of 0; as a value it is the lowest of all.
  static constexpr uint32_t kLowestBits =
      static_cast<uint32_t>(Format::kInfinity - 1) | 1u << (8 * sizeof(Bits) - 1);
  static constexpr uint32_t kLowest = kOfWord == 1 ? kLowestBits : kLowestBits * 0x10001u;
  static constexpr Bits kNegativeInfinity =
      static_cast<Bits>(Format::kInfinity | KeyLimits<Bits>::kNotSelectable);

  __device__ int of_group() const { return 1 << lane_bits_; }
  __device__ float* moments() const { return sums_ + groups_; }
  __device__ Bits* maxima() const {
    return reinterpret_cast<Bits*>(sums_ + (kEntropy ? 2 : 1) * groups_);
  }
  __device__ float maximum(int group) const {
    return word_value(static_cast<uint32_t>(maxima()[group]), 0, Format{});
  }

  // Where an entry's id lies, or beyond all groups.
  __device__ static uint32_t place_of(uint64_t rank) {
    return static_cast<uint32_t>(rank >> 32) - 1;
  }
  __device__ int group_of(uint64_t rank) const {
    return static_cast<int>(place_of(rank) / Row::kChunk >> lane_bits_);
  }

  // This lane's chunk of an entry's group; -1 if there is no such entry, an earlier one has the same
  // group, or it is of another segment. Without branches, so that loads wait for none.
  __device__ int chunk_of_first(const Block& block, const uint64_t* ranks, int entry,
                                int count) const {
    const int which = min(entry, count - 1);
    const int group = group_of(ranks[which]), tile = group >> (kLaneBits - lane_bits_);
    const bool repeats = (which > 0) & (group_of(ranks[max(which - 1, 0)]) == group);
    const bool is_first = (entry < count) & (tile >= first) & (tile < last()) & !repeats;
    return is_first ? (group << lane_bits_) + (block.lane & (of_group() - 1)) : -1;
  }

  // The sums of a chunk relative to a maximum.
  __device__ void sum_chunk(const uint4& chunk, float most, float& sum, float& moment) const {
    const uint32_t words[] = {chunk.x, chunk.y, chunk.z, chunk.w};
    sum = moment = 0;
#pragma unroll
    for (int i = 0; i < Row::kChunk; ++i) {
      float below = word_value(words[i / kOfWord], i % kOfWord, Format{}) - most;
      if constexpr (kEntropy) below = at_least(below, least_);  // 0 times -inf is NaN
      const float power = power_of_2(below * factor_);
      sum = i == 0 ? power : sum + power;
      if constexpr (kEntropy) moment = i == 0 ? power * below : fmaf(power, below, moment);
    }
  }

  // NaN stays NaN.
  __device__ static float at_least(float value, float least) {
    return bits_to_float(word_max<Float32>(float_to_bits(value), float_to_bits(least)));
  }

  // Adds up each tile's values over the lanes of a group, and returns those of tile lane % 4. Each
  // step halves the tiles that a lane holds.
  __device__ float of_own_tile(float (&values)[kTilesAtOnce], int lane) const {
#pragma unroll
    for (int half = kTilesAtOnce / 2; half > 0; half /= 2) {
      const bool upper = lane & half;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float given = upper ? values[i] : values[i + half];
        const float kept = upper ? values[i + half] : values[i];
        values[i] = kept + __shfl_xor_sync(kAllLanes, given, half);
      }
    }
    float sum = values[0];
#pragma unroll 1
    for (int other = kTilesAtOnce; other < of_group(); other *= 2)
      sum += __shfl_xor_sync(kAllLanes, sum, other);
    return sum;
  }

  // Sums a group without the excluded elements; a chunk of -1 is of none.
  __device__ void sum_group(const Block& block, int chunk, const uint4& loaded,
                            unsigned excluded) const {
    Bits bits[Row::kChunk];
    row.elements_of(chunk, loaded, excluded, bits);
    for (int i = 0; i < Row::kChunk; ++i)
      if ((excluded >> i) & 1) bits[i] = kNegativeInfinity;
    uint4 left;
    memcpy(&left, bits, sizeof left);
    uint32_t word = chunk_max<Format>(left);
    if constexpr (kOfWord == 2) word = word_max<Format>(word, __byte_perm(word, word, 0x1032));
    for (int other = 1; other < of_group(); other *= 2)
      word = word_max<Format>(word, __shfl_xor_sync(kAllLanes, word, other));
    word = word_max<Format>(word, kLowest);
    float sum, moment;
    sum_chunk(left, word_value(word, 0, Format{}), sum, moment);
    for (int other = 1; other < of_group(); other *= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, other);
      if constexpr (kEntropy) moment += __shfl_xor_sync(kAllLanes, moment, other);
    }
    if (chunk >= 0 && (block.lane & (of_group() - 1)) == 0)
      write(chunk, static_cast<Bits>(word), sum, moment);
  }

  __device__ void write(int chunk, Bits most, float sum, float moment) const {
    const int group = (chunk >> lane_bits_) - (first << (kLaneBits - lane_bits_));
    maxima()[group] = most;
    sums_[group] = sum;
    if constexpr (kEntropy) moments()[group] = moment;
  }

  float factor_;  // log2(e) / T
  float least_;   // of x - m; where that is less, the exponential is 0
  int lane_bits_, groups_;
  float* sums_;
};

// Joins the tails of two sets of groups, each of which may have no elements.
__device__ inline void add_tail(double other, double other_entropy, double& logsumexp,
                                double& entropy) {
  if (other == -INFINITY) return;
  if (logsumexp == -INFINITY) {  // so that NaN stays NaN
    logsumexp = other;
    entropy = other_entropy;
    return;
  }
  const double most = other > logsumexp ? other : logsumexp;
  const double ours = expf(static_cast<float>(logsumexp - most));
  const double theirs = expf(static_cast<float>(other - most));
  const double both = ours + theirs;
  const double log_both = log(both);
  const auto part = [&](double sum, double of, double its_entropy) {
    return sum / both * (its_entropy + log_both - (of - most));
  };
  entropy = part(ours, logsumexp, entropy) + part(theirs, other, other_entropy);
  logsumexp = most + log_both;
}

// Writes a row's results.
template <bool kEntropy>
__device__ void write_tail(const Tail& tail, int64_t row, double logsumexp, double entropy) {
  tail.logsumexp[row] = logsumexp;
  if constexpr (kEntropy) tail.entropy[row] = entropy;
}

// (ids, values) of the k best of each row, unless k is 0, and its tail. A block or a cluster serves
// one row.
template <bool kEntropy, class Format, class Tuning = Product>
__global__ void __launch_bounds__(kMaxThreads, 1)
    tail_kernel(const __grid_constant__ SelectWithTailArgs args,
                const __grid_constant__ TailPlan plan) {
  using Row = AlignedRow<Format, Tuning, kTailAlignment>;
  using Groups = GroupSums<Row, kEntropy>;
  const SelectArgs& select = args.select;
  const Tail& tail = args.tail;
  const int64_t index = blockIdx.x / plan.selection.cluster;
  const int k = select.k;
  const Shared<Format> shared(plan.selection, k);
  Block block(shared.scratch);
  if (!select.allowed.row(index)) {
    if (cluster_rank() > 0) return;
    for (int i = block.thread; i < k; i += block.threads) {
      select.ids[index * k + i] = -1;
      select.values[index * k + i] = -INFINITY;
    }
    if (block.thread == 0) write_tail<kEntropy>(tail, index, 0, 0);
    return;
  }

  const char* logits = select.logits.row(index);
  const Row row(logits, static_cast<int>(tail.width), nullptr);
  char* memory = shared_memory() + plan.offset;
  const float temperature = tail.temperature.at(index);
  const Groups streamed(row, temperature, plan, cluster_size() > 1 ? in_leader(memory) : memory);
  const int found = select_row<Tuning>(block, shared, logits, select.allowed, k,
                                       plan.selection.lane_bits, [](int) {}, streamed);
  if (found < 0) return;
  // Values are read from the row, as in select_kernel.
  for (int i = block.thread; i < k; i += block.threads) {
    select.ids[index * k + i] = i < found ? shared.id(i) : -1;
    select.values[index * k + i] = i < found ? row.value(shared.id(i)) : -INFINITY;
  }

  const Groups groups = streamed.in(memory);
  const bool given = tail.ids.width > 0;
  const int listed = given ? static_cast<int>(tail.ids.width) : k;
  int size = 1;
  while (size < listed) size *= 2;
  for (int i = block.thread; i < size; i += block.threads) {  // the thread that has read shared.id(i)
    int64_t id = -1;
    if (i < listed) {
      if (given)
        id = id_at(tail.ids.row(index), tail.ids.dtype, i);
      else if (i < found)
        id = shared.id(i);
    }
    shared.ranks[i] = groups.rank_of(id, i);
  }
  __syncthreads();  // all ranks are written
  if (listed <= kEntryThreads)
    place_descending(block, shared.ranks, listed);
  else
    sort_descending(block, shared.ranks, size);
  groups.leave_out(block, shared.ranks, listed);
  __syncthreads();  // the sums are written
  groups.combine(block, temperature, [&](double logsumexp, double entropy) {
    if (plan.first > 0)
      add_tail(tail.logsumexp[index], kEntropy ? tail.entropy[index] : 0, logsumexp, entropy);
    write_tail<kEntropy>(tail, index, logsumexp, entropy);
  });
}

}  // namespace opd::cuda
