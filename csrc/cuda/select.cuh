// Selection: the k best of a row, exactly, in one read of it.
//
// A row is cut into groups of adjacent elements. One pass leaves each group's largest key in shared
// memory. The k best elements all lie in the k best groups (ties go to the lower group), which are
// read again. None of the k best is below the smallest of these groups' keys. Elements that reach
// it are the candidates, usually few more than k. They are listed and sorted. If there are too many
// (equal values, clusters of values), they are thinned out first, as the groups were: the k-th key
// is found by bisection with counts. Several blocks share a multiprocessor: while one chooses,
// others stream. If there are few rows, the blocks of a cluster stream pieces of one row into the
// shared memory of the first.
//
// Bytes: V elements, k groups a second time, and a third time if there are too many candidates.
#pragma once

#include "../common/arguments.h"
#include "../common/ordering.h"
#include "plan.h"
#include "tuning.cuh"

namespace opd::cuda {

// A row, counted from the aligned address at or before its first element.
template <class ItsFormat, class ItsTuning, int kAlign = kAlignment>
class AlignedRow {
 public:
  using Format = ItsFormat;
  using Tuning = ItsTuning;
  using Bits = typename Format::Bits;
  static constexpr int kChunk = kChunkBytes / sizeof(Bits);
  static constexpr int kTile = kTileBytes / sizeof(Bits);
  static constexpr unsigned kAll = (1u << kChunk) - 1;

  __device__ AlignedRow(const char* row, int width, const uint64_t* banned)
      : start_(reinterpret_cast<const Bits*>(row - skipped_bytes(row))),
        banned_(banned),
        skip_(skipped_bytes(row) / static_cast<int>(sizeof(Bits))),
        width_(width) {}

  __device__ int tiles() const { return (skip_ + width_ + kTile - 1) / kTile; }
  // Tiles [begin, end) lie in the row with all their elements.
  __device__ int whole_begin() const { return skip_ > 0; }
  __device__ int whole_end() const { return (skip_ + width_) / kTile; }
  __device__ int width() const { return width_; }
  __device__ bool has_banned() const { return banned_ != nullptr; }
  __device__ int id_of(int chunk, int element) const { return chunk * kChunk + element - skip_; }
  // The inverse: chunk * kChunk + element.
  __device__ int place_of(int id) const { return id + skip_; }
  __device__ float value(int id) const { return Format::widen(start_[place_of(id)]); }

  __device__ uint4 load_whole(int chunk) const {
    return Tuning::load(reinterpret_cast<const uint4*>(start_) + chunk);
  }

  // A bit for each element of a chunk that cannot be selected.
  __device__ unsigned excluded(int chunk) const {
    const int first = id_of(chunk, 0);
    const unsigned outside = outside_row(first);
    if (!banned_ || outside == kAll) return outside;
    const int word = first >> 6, shift = first & 63;
    const uint64_t low = word >= 0 ? banned_[word] : 0;
    const uint64_t high = shift > 64 - kChunk && (word + 1) * 64 < width_ ? banned_[word + 1] : 0;
    return outside | (static_cast<unsigned>(low >> shift | high << 1 << (63 - shift)) & kAll);
  }

  // Whether a tile that lies in the row with all its elements holds a banned id.
  __device__ bool bans_in(int tile) const {
    constexpr int kWords = kTile / 64;
    const int first = id_of(tile * kWarp, 0), shift = first & 63;
    const uint64_t* words = banned_ + (first >> 6);
    uint64_t found = words[0] >> shift;
    for (int i = 1; i < kWords; ++i) found |= words[i];
    if (shift > 0) found |= words[kWords] << (64 - shift);
    return found != 0;
  }

  // Whether a chunk lies in the row with all its elements.
  __device__ bool is_whole(int chunk) const {
    const int first = id_of(chunk, 0);
    return (first >= 0) & (first + kChunk <= width_);
  }

  // The elements of a chunk. `loaded` holds them if the chunk is whole; if not, they are read, but
  // for those that are excluded.
  __device__ void elements_of(int chunk, const uint4& loaded, unsigned excluded,
                              Bits* bits) const {
    if (is_whole(chunk)) {
      memcpy(bits, &loaded, kChunkBytes);
    } else {
      for (int i = 0; i < kChunk; ++i)
        bits[i] = (excluded >> i) & 1 ? Bits(0) : start_[chunk * kChunk + i];
    }
  }

  // The keys of these elements.
  __device__ void keys_of(int chunk, const uint4& loaded, unsigned excluded, Bits* keys) const {
    Bits bits[kChunk];
    elements_of(chunk, loaded, excluded, bits);
    for (int i = 0; i < kChunk; ++i)
      keys[i] = static_cast<Bits>(order_key<Format>(static_cast<int32_t>(bits[i])));
    if (excluded == 0) return;
    for (int i = 0; i < kChunk; ++i)
      if ((excluded >> i) & 1) keys[i] = KeyLimits<Bits>::kNotSelectable;
  }

 private:
  __device__ static int skipped_bytes(const char* row) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(row) % kAlign);
  }

  __device__ unsigned outside_row(int first) const {
    const int before = min(max(-first, 0), kChunk);
    const int until = min(max(width_ - first, 0), kChunk);
    return ((1u << before) - 1) | (kAll & ~((1u << until) - 1));
  }

  const Bits* start_;
  const uint64_t* banned_;
  int skip_, width_;
};

// The keys of one tile's groups, without the elements that cannot be selected. Lane `writer` of
// each group, modulo the group's number of lanes, writes its key.
template <class Row>
__device__ void exact_tile(const Row& row, int tile, int lane_bits, int writer,
                           typename Row::Bits* keys) {
  using Bits = typename Row::Bits;
  const int lane = threadIdx.x % kWarp, chunk = tile * kWarp + lane;
  Bits of_chunk[Row::kChunk];
  uint4 loaded{};
  if (row.is_whole(chunk)) loaded = row.load_whole(chunk);
  row.keys_of(chunk, loaded, row.excluded(chunk), of_chunk);
  int best = of_chunk[0];
  for (const Bits key : of_chunk) best = max(best, static_cast<int>(key));
  for (int other = 1; other < 1 << lane_bits; other *= 2)
    best = max(best, __shfl_xor_sync(kAllLanes, best, other));
  if (((lane ^ writer) & ((1 << lane_bits) - 1)) == 0) keys[chunk >> lane_bits] = static_cast<Bits>(best);
}

// The maximum of a chunk; of 16-bit formats that of the lower and of the upper halves of its words.
template <class Format>
__device__ uint32_t chunk_max(const uint4& chunk) {
  return word_max<Format>(word_max<Format>(chunk.x, chunk.y), word_max<Format>(chunk.z, chunk.w));
}

// The chunk maxima that a lane holds of several tiles. With 16-bit formats a word holds those of two
// tiles.
template <class Format, int kTiles>
struct ChunkMaxima {
  static constexpr int kOfWord = sizeof(uint32_t) / sizeof(typename Format::Bits);
  static constexpr int kWords = kTiles / kOfWord;
  uint32_t words[kWords];

  __device__ explicit ChunkMaxima(const uint4 (&chunks)[kTiles]) {
    for (int i = 0; i < kWords; ++i) {
      if constexpr (kOfWord == 1) {
        words[i] = chunk_max<Format>(chunks[i]);
      } else {
        const uint32_t a = chunk_max<Format>(chunks[2 * i]);
        const uint32_t b = chunk_max<Format>(chunks[2 * i + 1]);
        words[i] = word_max<Format>(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632));
      }
    }
  }

  __device__ void combine_lanes(int lane_bits) {
#pragma unroll
    for (int bit = 0; bit < kLaneBits; ++bit)
      if (bit < lane_bits)
        for (uint32_t& word : words)
          word = word_max<Format>(word, __shfl_xor_sync(kAllLanes, word, 1 << bit));
  }

  __device__ typename Format::Bits bits(int tile) const {
    // Selects by halves, with constant indices, because registers have no addresses.
    uint32_t left[kWords];
    memcpy(left, words, sizeof left);
#pragma unroll
    for (int half = kWords / 2; half > 0; half /= 2)
#pragma unroll
      for (int i = 0; i < half; ++i) left[i] = tile / kOfWord & half ? left[i + half] : left[i];
    uint32_t word = left[0];
    if constexpr (kOfWord == 2) word = tile % 2 ? word >> 16 : word;
    return static_cast<typename Format::Bits>(word);
  }

  __device__ typename Format::Bits key(int tile) const {
    return static_cast<typename Format::Bits>(
        order_key<Format>(static_cast<int32_t>(bits(tile))));
  }
};

// What stream() leaves of a row beside the group keys: nothing. tail.cuh has sums of groups.
struct KeysAlone {
  static constexpr bool kSums = false;
  static constexpr int kAlign = kAlignment;
  static constexpr int kTilesAtOnce = cuda::kTilesAtOnce;
};

// Tiles with keys: none if nothing can be selected.
template <class Row>
__device__ int key_tiles(const Row& row) {
  return row.width() > 0 ? row.tiles() : 0;
}

// Writes the group keys of the tiles [first, last): first those of whole tiles, without looking at
// single elements, then again or for the first time those of tiles with banned ids or cut by the
// row's ends. With `waiting` the keys go to another block's memory, and the barrier that says that
// it runs is still to be waited for. By then loads are under way.
//
// With sums, `tail` has a row of its own, which may be wider than `row`, and the tiles are those of
// it. Then keys are written of tiles in `row` alone.
template <class Row, class Tail>
__device__ void stream(const Block& block, const Row& row, int first, int last, int lane_bits,
                       bool waiting, typename Row::Bits* keys, const Tail& tail) {
  constexpr int kTilesAtOnce = Tail::kTilesAtOnce;
  int begin = max(first, row.whole_begin()), end = min(last, row.whole_end());
  if constexpr (Tail::kSums) {
    begin = max(first, tail.row.whole_begin());
    end = min(last, tail.row.whole_end());
  }
  const int of_group = 1 << lane_bits, lane_in_group = block.lane & (of_group - 1);
  const int group_in_tile = block.lane >> lane_bits;
  const int own = begin + block.warp * kTilesAtOnce, stride = block.warps * kTilesAtOnce;
  for (int tile = own; tile < end; tile += stride) {
    uint4 chunks[kTilesAtOnce];
    const int count = min(end - tile, kTilesAtOnce), chunk = tile * kWarp + block.lane;
    if (count == kTilesAtOnce) {
      for (int i = 0; i < kTilesAtOnce; ++i) chunks[i] = row.load_whole(chunk + i * kWarp);
    } else {  // past the end: the last tile again
      for (int i = 0; i < kTilesAtOnce; ++i)
        chunks[i] = row.load_whole(chunk + min(i, count - 1) * kWarp);
    }
    ChunkMaxima<typename Row::Format, kTilesAtOnce> maxima(chunks);
    maxima.combine_lanes(lane_bits);
    if (waiting) cluster_wait();  // the first block runs, so its memory may be written
    waiting = false;
    const int written = Tail::kSums ? min(count, key_tiles(row) - tile) : count;
    for (int i = lane_in_group; i < written; i += of_group)
      keys[((tile + i) << (kLaneBits - lane_bits)) + group_in_tile] = maxima.key(i);
    if constexpr (Tail::kSums) tail.add(block, tile, count, lane_bits, chunks, maxima);
  }

  if (waiting) cluster_wait();  // this warp had no tile

  // With sums, the tile that `row` ends in may have been streamed like a whole one.
  bool looks_again = row.has_banned();
  if constexpr (Tail::kSums)
    looks_again |= row.whole_end() < min(key_tiles(row), tail.row.whole_end());
  if (looks_again) {
    // Each lane checks one of the tiles that this warp has streamed. If a tile holds banned ids,
    // the lanes that wrote its keys write them again.
    for (int tile = own; tile < end; tile += kWarp / kTilesAtOnce * stride) {
      const int place = block.lane % kTilesAtOnce;
      const int seen = tile + block.lane / kTilesAtOnce * stride + place;
      bool is_dirty;
      if constexpr (Tail::kSums)
        is_dirty = seen < min(end, key_tiles(row)) &&
                   (seen >= row.whole_end() || (row.has_banned() && row.bans_in(seen)));
      else
        is_dirty = seen < end && row.bans_in(seen);
      unsigned dirty = __ballot_sync(kAllLanes, is_dirty);
      for (; dirty != 0; dirty &= dirty - 1) {
        const int lane = __ffs(dirty) - 1;
        exact_tile(row, __shfl_sync(kAllLanes, seen, lane), lane_bits, lane % kTilesAtOnce, keys);
      }
    }
  }
  if constexpr (Tail::kSums) {
    const int tile = tail.cut_tile(block);
    if (tile < 0) return;
    if (tile < key_tiles(row)) exact_tile(row, tile, lane_bits, 0, keys);
    tail.add_cut_tile(block, tile);
  } else {
    const bool first_is_cut = first == 0 && row.whole_begin() > 0;
    const int cut_at_end = row.whole_end();
    if (first_is_cut && block.warp == 0) exact_tile(row, 0, lane_bits, 0, keys);
    if (cut_at_end < last && !(first_is_cut && cut_at_end == 0) && block.warp == block.warps - 1)
      exact_tile(row, cut_at_end, lane_bits, 0, keys);
  }
}

// Vectors of keys, for loads of 16 bytes from shared memory.
template <class Bits>
struct KeyVector {
  static constexpr int kKeys = kChunkBytes / sizeof(Bits);
  Bits keys[kKeys];

  __device__ static KeyVector load(const Bits* keys, int vector) {
    KeyVector loaded;
    const uint4 words = reinterpret_cast<const uint4*>(keys)[vector];
    memcpy(loaded.keys, &words, sizeof words);
    return loaded;
  }

  __device__ void store(Bits* keys, int vector) const {
    uint4 words;
    memcpy(&words, this->keys, sizeof words);
    reinterpret_cast<uint4*>(keys)[vector] = words;
  }

  // How many keys are at least `key`. Halves are compared in place: the bits below cannot matter.
  __device__ int reach(int key) const {
    constexpr int kShift = 32 - 8 * sizeof(Bits);
    uint32_t words[4];
    memcpy(words, keys, sizeof words);
    const int least = static_cast<int>(static_cast<uint32_t>(key) << kShift);
    int count = 0;
    for (const uint32_t word : words) {
      count += static_cast<int>(word) >= least;
      if (kShift > 0) count += static_cast<int>(word << kShift) >= least;
    }
    return count;
  }
};

// Calls emit(place, index) for the k largest keys in shared memory, in storage order; ties go to
// the lower index. Returns how many there are: k, or fewer where fewer can be selected. The keys
// are whole vectors. `low` and `high` bound the k-th key; at the end at most k keys exceed `low`.
template <class Bits, class Emit>
__device__ int choose_best(Block& block, const Bits* keys, int vectors, int k, int& low, int high,
                           const Emit& emit) {
  using Vector = KeyVector<Bits>;
  while (low < high) {  // the largest key that k keys reach lies in [low, high]
    const int middle = (low | high) - ((low ^ high) >> 1);
    int reached = 0;
    for (int i = block.thread; i < vectors; i += block.threads)
      reached += Vector::load(keys, i).reach(middle);
    reached = block.sum(reached);
    if (reached >= k) low = middle;
    if (reached <= k) high = reached == k ? middle : middle - 1;
  }

  // Each warp has its own range of vectors. The upper half of a count has the keys above `low`, at
  // most k. The lower half has the keys equal to it, fewer than 2^16.
  const int of_warp = (vectors + block.warps - 1) / block.warps;
  const int begin = block.warp * of_warp, end = min(begin + of_warp, vectors);
  unsigned counts = 0;
  for (int i = begin + block.lane; i < end; i += kWarp)
    for (const Bits key : Vector::load(keys, i).keys)
      counts += key > low ? 1u << 16 : key == low ? 1u : 0u;
  unsigned before, total;
  block.sums_of_warps(counts, before, total);
  const int above = static_cast<int>(total >> 16);
  const int wanted = min(k - above, static_cast<int>(total & 0xffff));
  for (int i = begin; i < end; i += kWarp) {
    unsigned is_above = 0, is_equal = 0;
    if (i + block.lane < end) {
      const Vector vector = Vector::load(keys, i + block.lane);
      for (int j = 0; j < Vector::kKeys; ++j) {
        is_above |= static_cast<unsigned>(vector.keys[j] > low) << j;
        is_equal |= static_cast<unsigned>(vector.keys[j] == low) << j;
      }
    }
    if (static_cast<int>(before & 0xffff) >= wanted) is_equal = 0;  // enough were found before
    const unsigned mine = static_cast<unsigned>(__popc(is_above)) << 16 | __popc(is_equal);
    if (!__any_sync(kAllLanes, mine != 0)) continue;
    unsigned until = mine;  // inclusive over the lanes
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const unsigned theirs = __shfl_up_sync(kAllLanes, until, distance);
      if (block.lane >= distance) until += theirs;
    }
    const unsigned start = before + until - mine;
    int place_above = static_cast<int>(start >> 16), equals = static_cast<int>(start & 0xffff);
    for (unsigned left = is_above | is_equal; left != 0; left &= left - 1) {
      const int j = __ffs(left) - 1;
      const int place = place_above + min(equals, wanted);
      if ((is_above >> j) & 1) {
        emit(place, (i + block.lane) * Vector::kKeys + j);
        ++place_above;
      } else {
        if (equals < wanted) emit(place, (i + block.lane) * Vector::kKeys + j);
        ++equals;
      }
    }
    before += __shfl_sync(kAllLanes, until, kWarp - 1);
  }
  return above + wanted;
}

// Bounds of the k-th largest key. Each thread deals its keys into 2^n sets. If there are k sets or
// more in the block, at least k keys reach the smallest of the sets' maxima.
template <class Bits>
__device__ void key_range(Block& block, const Bits* keys, int vectors, int k, int& low, int& high) {
  using Vector = KeyVector<Bits>;
  int best[Vector::kKeys];  // a set for each place in a vector
  for (int& of_set : best) of_set = KeyLimits<Bits>::kNotSelectable;
  for (int i = block.thread; i < vectors; i += block.threads) {
    const Vector vector = Vector::load(keys, i);
    for (int j = 0; j < Vector::kKeys; ++j)
      best[j] = max(best[j], static_cast<int>(vector.keys[j]));
  }
  // Merges sets, as long as k are left.
  const int holders = min(block.threads, vectors);
  int least = KeyLimits<Bits>::kNotSelectable;
#pragma unroll
  for (int sets = Vector::kKeys; sets > 0; sets /= 2) {
    if (sets * holders >= k) {
      least = best[0];
      for (int j = 1; j < sets; ++j) least = min(least, best[j]);
    }
    for (int j = 0; j < sets / 2; ++j) best[j] = max(best[j], best[j + sets / 2]);
  }
  low = block.thread < vectors ? least : KeyLimits<Bits>::kNaN;
  high = best[0];
  block.range(low, high);
  low = max(low, KeyLimits<Bits>::kNotSelectable + 1);
}

// The chunk number `index` of the listed groups.
__device__ inline int chunk_of(const int32_t* list, int index, int lane_bits) {
  return (list[index >> lane_bits] << lane_bits) + (index & ((1 << lane_bits) - 1));
}

// The parts of a block's shared memory.
template <class Format>
class Shared {
 public:
  using Bits = typename Format::Bits;

  __device__ Shared(const Plan& plan, int k)
      : keys(reinterpret_cast<Bits*>(shared_memory())),
        ranks(reinterpret_cast<uint64_t*>(shared_memory() + plan.key_bytes)),
        most(plan.candidates),
        scratch(reinterpret_cast<char*>(ranks + plan.candidates)),
        list(reinterpret_cast<int32_t*>(scratch + Block::kScratchBytes)),
        count(list + k) {}

  __device__ int id(int place) const { return rank_key_id(ranks[place]); }
  __device__ float value(int place) const {
    return value_of_key<Format>(rank_key_key(ranks[place]));
  }

  Bits* const keys;       // of the groups, later of the elements of k groups
  uint64_t* const ranks;  // of the candidates, at the end of the k best, in order
  const int most;         // the most candidates that `ranks` holds
  char* const scratch;    // for Block
  int32_t* const list;    // the k best groups
  int32_t* const count;   // of candidates
};

// Calls body(chunk, place, keys) for this thread's chunks of the listed groups. Several chunks are
// loaded before the first is used.
template <class Row, class Body>
__device__ void for_chunks(const Block& block, const Row& row, const int32_t* list, int groups,
                           int lane_bits, const Body& body) {
  constexpr int kChunksAtOnce = Row::Tuning::kChunksAtOnce;
  const int count = groups << lane_bits;
  for (int i = block.thread; i < count;) {
    uint4 loaded[kChunksAtOnce];
#pragma unroll
    for (int j = 0; j < kChunksAtOnce; ++j) {
      const int ahead = i + j * block.threads;
      const int chunk = chunk_of(list, min(ahead, count - 1), lane_bits);
      loaded[j] = uint4{};
      if ((ahead < count) & row.is_whole(chunk)) loaded[j] = row.load_whole(chunk);
    }
#pragma unroll 1  // one copy of the body; the next chunk moves to loaded[0]
    for (int j = 0; j < kChunksAtOnce && i < count; ++j, i += block.threads) {
      const int chunk = chunk_of(list, i, lane_bits);
      KeyVector<typename Row::Bits> vector;
      row.keys_of(chunk, loaded[0], row.excluded(chunk), vector.keys);
      body(chunk, i, vector);
      for (int next = 1; next < kChunksAtOnce; ++next) loaded[next - 1] = loaded[next];
    }
  }
}

// Selects from a row. Afterwards shared.ranks holds the k best, in order. Returns their number, and
// -1 in the blocks of a cluster that only stream. Calls expect(id) early for ids that include the k
// best and usually few others. Ends with a barrier.
template <class Tuning, class Format, class Expect, class Tail>
__device__ int select_row(Block& block, const Shared<Format>& shared, const char* logits,
                          const Allowed& allowed, int k, int lane_bits, const Expect& expect,
                          const Tail& tail) {
  using Bits = typename Format::Bits;
  using Row = AlignedRow<Format, Tuning, Tail::kAlign>;
  using Vector = KeyVector<Bits>;
  const Row row(logits, static_cast<int>(allowed.limit), allowed.banned);
  const int rank = cluster_rank(), blocks = cluster_size();
  int tiles = row.tiles(), first = 0, streamed = tiles;
  if constexpr (Tail::kSums) {
    tiles = key_tiles(row);
    first = tail.first, streamed = tail.last() - tail.first;
  }
  if (blocks > 1) cluster_arrive();  // this block runs
  const int groups = tiles << (kLaneBits - lane_bits);
  const int group_vectors = (groups + Row::kChunk - 1) / Row::kChunk;
  if constexpr (!Tail::kSums)  // with sums, groups are so small that a tile's are whole vectors
    if (block.thread < group_vectors * Row::kChunk - groups)  // a last vector that is not full
      shared.keys[groups + block.thread] = KeyLimits<Bits>::kNotSelectable;
  for (int i = block.thread; i < shared.most; i += block.threads) shared.ranks[i] = 0;
  if (block.thread == 0) *shared.count = 0;

  stream(block, row, first + rank * streamed / blocks, first + (rank + 1) * streamed / blocks,
         lane_bits, blocks > 1, blocks > 1 ? in_leader(shared.keys) : shared.keys, tail);
  if (blocks > 1) {
    cluster_barrier();
    if (rank > 0) return -1;
  } else {
    __syncthreads();
  }
  if constexpr (Tail::kSums)
    if (k == 0) return 0;
  int low, high;
  key_range(block, shared.keys, group_vectors, k, low, high);
  const int listed = choose_best(block, shared.keys, group_vectors, k, low, high,
                                 [&](int place, int group) { shared.list[place] = group; });
  __syncthreads();  // the list is written, and the group keys are no longer needed

  // k groups reach `low`, so at least k elements do: it is a lower bound for them, too.
  for_chunks(block, row, shared.list, listed, lane_bits, [&](int chunk, int, const Vector& vector) {
    const int reached = vector.reach(low);
    if (reached == 0) return;
    int place = atomicAdd(shared.count, reached);
    for (int i = 0; i < Vector::kKeys; ++i) {
      if (vector.keys[i] < low || place >= shared.most) continue;
      const int id = row.id_of(chunk, i);
      expect(id);
      shared.ranks[place++] = rank_key(vector.keys[i], id);
    }
  });
  __syncthreads();
  int found = *shared.count;
  if (found > shared.most) {
    for_chunks(block, row, shared.list, listed, lane_bits,
               [&](int, int place, const Vector& vector) { vector.store(shared.keys, place); });
    __syncthreads();
    found = choose_best(
        block, shared.keys, listed << lane_bits, k, low, high, [&](int place, int index) {
          const int chunk = chunk_of(shared.list, index / Row::kChunk, lane_bits);
          const int id = row.id_of(chunk, index % Row::kChunk);
          expect(id);
          shared.ranks[place] = rank_key(shared.keys[index], id);
        });
    for (int i = found + block.thread; i < shared.most; i += block.threads) shared.ranks[i] = 0;
    __syncthreads();
  }
  if (found <= kEntryThreads) {
    place_descending(block, shared.ranks, found);
  } else {
    int size = 2 * kEntryThreads;
    while (size < found) size *= 2;
    sort_descending(block, shared.ranks, size);
  }
  return min(found, k);
}

// (ids, values) of the k best of each row. A block or a cluster serves one row.
template <class Format, class Tuning = Product>
__global__ void __launch_bounds__(kMaxThreads, 1)
    select_kernel(const __grid_constant__ SelectArgs args, const __grid_constant__ Plan plan) {
  const int64_t row = blockIdx.x / plan.cluster;
  const int k = args.k;
  const Shared<Format> shared(plan, k);
  Block block(shared.scratch);
  const char* logits = args.logits.row(row);
  int found = 0;
  if (args.allowed.row(row))
    found = select_row<Tuning>(block, shared, logits, args.allowed, k, plan.lane_bits, [](int) {},
                               KeysAlone{});
  if (cluster_rank() > 0) return;
  // Values are read from the row: a key has neither a zero's sign nor a NaN's bits.
  const auto* bits = reinterpret_cast<const typename Format::Bits*>(logits);
  for (int i = block.thread; i < k; i += block.threads) {
    args.ids[row * k + i] = i < found ? shared.id(i) : -1;
    args.values[row * k + i] = i < found ? Format::widen(bits[shared.id(i)]) : -INFINITY;
  }
}

}  // namespace opd::cuda
