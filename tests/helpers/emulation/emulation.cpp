// The scheduler of the emulation: fibers, what they wait for, and who is next.

#include "emulation.h"

#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#error "fibers are switched in x86-64 assembly"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

// Under ThreadSanitizer every thread of a block is one of its threads, and nothing orders what they
// do but barriers: not the order in which they happen to run, nor exchanges between lanes. This
// file is compiled without it and tells it so.
#if defined(OPD_EMULATION_RACES)
constexpr bool kRaces = true;
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* token);
void __tsan_release(void* token);
}
#else
constexpr bool kRaces = false;
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif

// Saves what a call preserves, and the stack, in *from; continues where `to` was saved.
extern "C" void switch_stacks(void** from, void* to);
asm(R"(
.text
.type switch_stacks,@function
switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size switch_stacks,.-switch_stacks
)");

// How often kernels have read 16 bytes of a row.
extern "C" {
__attribute__((visibility("default"))) int64_t emulated_loads = 0;
}

namespace emulation {

void count_load() { ++emulated_loads; }

Thread* current = nullptr;
Shape shape{};

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kWarp = 32;
// What shared memory holds at first, by schedule: as keys below all others, above, in between.
constexpr int kPatterns[] = {0xa5, 0x7f, 0x00, 0x3c};

// Threads that wait for each other, and where: a warp, a block, a cluster.
struct Group {
  std::vector<int> waiting;
  size_t size = 0;
  const char* file = nullptr;
  int line = 0;
  bool started = false;
  // Who leaves a barrier has seen what was written before it; whoever is already at the next one
  // uses the other token.
  char tokens[2];
  int turn = 0;
  size_t arrived = 0;  // at a cluster's barrier, whose halves are apart
};

struct Warp : Group {
  uint32_t values[2][kWarp];
  int value_turn = 0;
};

struct Fiber : Thread {
  int number = 0;
  bool done = false;
  int arrived_turn = -1;  // of the cluster, where the thread has arrived and not yet waited
  char* shared = nullptr;
  Warp* warp = nullptr;
  Group* of_block = nullptr;
  char* stack = nullptr;
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;        // AddressSanitizer's
  void* sanitizer_thread = nullptr;  // ThreadSanitizer's
};

struct Memory {
  explicit Memory(int bytes) : at(new char[static_cast<size_t>(bytes)]), size(bytes) {}
  void fill(int pattern) const { memset(at.get(), pattern, static_cast<size_t>(size)); }
  std::unique_ptr<char[]> at;
  int size;
};

// The order in which threads that can run do so: the least key first.
class Schedule {
 public:
  Schedule() {
    const char* text = std::getenv("OPD_EMULATION_SCHEDULE");
    kind_ = text ? std::atoi(text) : 0;
    random_.seed(static_cast<unsigned>(kind_));
  }

  int pattern() const { return kPatterns[kind_ & 3]; }

  int64_t key(int number) {
    return kind_ == 0 ? number : kind_ == 1 ? -number : static_cast<int64_t>(random_());
  }

 private:
  int kind_;
  std::mt19937 random_;
};

// What runs, one cluster of blocks at a time.
struct Running {
  const std::function<void()>* body = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Group> blocks;
  std::vector<Memory> memories;
  Group cluster;
  std::vector<std::pair<int64_t, int>> ready;  // a heap
  Schedule* schedule = nullptr;
  std::string failure;
  std::string without;
  void* stack_pointer = nullptr;  // the scheduler's
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  void* sanitizer_thread = nullptr;
  char launched, ended;  // ThreadSanitizer's tokens
} running;

void before_switch([[maybe_unused]] void** fake, [[maybe_unused]] const void* bottom,
                   [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake, bottom, size);
#endif
}

void after_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** bottom,
                  [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, bottom, size);
#endif
}

Fiber& self() { return *static_cast<Fiber*>(current); }

void make_ready(int number) {
  running.ready.emplace_back(-running.schedule->key(number), number);
  std::push_heap(running.ready.begin(), running.ready.end());
}

void to_scheduler() {
  Fiber& fiber = self();
  __tsan_switch_to_fiber(running.sanitizer_thread, 1);
  before_switch(fiber.done ? nullptr : &fiber.fake_stack, running.stack_bottom, running.stack_size);
  switch_stacks(&fiber.stack_pointer, running.stack_pointer);
  after_switch(fiber.fake_stack, nullptr, nullptr);
}

[[noreturn]] void fiber_main() {
  after_switch(nullptr, &running.stack_bottom, &running.stack_size);
  __tsan_acquire(&running.launched);
  if (!kRaces && !self().of_block->started) {  // what another block wrote here before is lost
    self().of_block->started = true;
    running.memories[static_cast<size_t>(self().cluster_rank)].fill(running.schedule->pattern());
  }
  (*running.body)();
  __tsan_release(&running.ended);
  self().done = true;
  to_scheduler();
  std::abort();
}

void run_fiber(Fiber& fiber) {
  current = &fiber;
  __tsan_switch_to_fiber(fiber.sanitizer_thread, 1);
  before_switch(&running.fake_stack, fiber.stack, kStackBytes);
  switch_stacks(&running.stack_pointer, fiber.stack_pointer);
  after_switch(running.fake_stack, nullptr, nullptr);
}

// A stack, and what ThreadSanitizer takes for a thread: kept for the next launch.
void give_stack(Fiber& fiber) {
  static std::vector<std::pair<char*, void*>> kept;
  const auto number = static_cast<size_t>(fiber.number);
  while (kept.size() <= number) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    kept.emplace_back(static_cast<char*>(memory), __tsan_create_fiber(0));
  }
  fiber.stack = kept[number].first;
  fiber.sanitizer_thread = kept[number].second;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // of a launch that failed
#endif
}

void start(Fiber& fiber) {
  give_stack(fiber);
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;  // where a caller's return address would be, which aligns the stack
  *--top = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = top - 6;  // the registers that are restored
  make_ready(fiber.number);
}

bool left_out(const char* file, int line) {
  if (running.without.empty()) return false;
  const char* name = strrchr(file, '/');
  return running.without == std::string(name ? name + 1 : file) + ":" + std::to_string(line);
}

void fail(const std::string& what) {
  if (running.failure.empty()) running.failure = what;
}

// Threads that meet do so at one line.
void meet(Group& group, bool first, const char* file, int line) {
  if (first) group.file = file, group.line = line;
  if (group.line != line || strcmp(group.file, file) != 0)
    fail("threads that have to meet are at " + std::string(group.file) + ":" +
         std::to_string(group.line) + " and " + file + ":" + std::to_string(line));
}

void release(Group& group) {
  for (const int number : group.waiting) make_ready(number);
  group.waiting.clear();
  group.turn ^= 1;
}

void wait(Group& group, const char* file, int line) {
  meet(group, group.waiting.empty(), file, line);
  group.waiting.push_back(self().number);
  if (group.waiting.size() == group.size) release(group);
  to_scheduler();
}

void barrier(Group& group, const char* file, int line) {
  if (left_out(file, line)) return;
  char* token = &group.tokens[group.turn];
  __tsan_release(token);
  wait(group, file, line);
  __tsan_acquire(token);
}

void arrive(Group& group, bool ordered, const char* file, int line) {
  Fiber& fiber = self();
  meet(group, group.arrived == 0, file, line);
  if (fiber.arrived_turn >= 0) fail("a thread arrives twice and does not wait between");
  fiber.arrived_turn = group.turn;
  if (ordered) __tsan_release(&group.tokens[group.turn]);
  if (++group.arrived < group.size) return;
  group.arrived = 0;
  release(group);
}

void wait_for_arrived(Group& group) {
  Fiber& fiber = self();
  const int turn = fiber.arrived_turn;
  fiber.arrived_turn = -1;
  if (turn < 0) return fail("a thread waits and has not arrived");
  if (turn == group.turn) {  // not all have arrived
    group.waiting.push_back(fiber.number);
    to_scheduler();
  }
  __tsan_acquire(&group.tokens[turn]);
}

void reset(Group& group, int size) {
  group.size = static_cast<size_t>(size);
  group.waiting.reserve(group.size);  // a thread of the block allocates nothing
}

template <class AnyGroup>
void reset(std::vector<AnyGroup>& groups, int count, int size) {
  groups.assign(static_cast<size_t>(count), AnyGroup{});
  for (AnyGroup& group : groups) reset(group, size);
}

// The blocks from `first` on that make up a cluster.
void run_cluster(Index first, int threads, int shared_bytes) {
  const int blocks = shape.cluster, count = threads * blocks;
  running.ready.clear();
  running.failure.clear();
  running.fibers.assign(static_cast<size_t>(count), Fiber{});
  running.ready.reserve(static_cast<size_t>(count));
  running.cluster = Group{};
  reset(running.cluster, count);
  reset(running.warps, count / kWarp, kWarp);
  reset(running.blocks, blocks, threads);
  running.memories.clear();
  for (int block = 0; block < blocks; ++block) {
    running.memories.emplace_back(shared_bytes);
    if (kRaces) running.memories.back().fill(running.schedule->pattern());
  }
  __tsan_release(&running.launched);
  for (int number = 0; number < count; ++number) {
    Fiber& fiber = running.fibers[static_cast<size_t>(number)];
    const int block = number / threads;
    fiber.number = number;
    fiber.thread = {static_cast<unsigned>(number % threads), 0};
    fiber.block = {first.x + static_cast<unsigned>(block), first.y};
    fiber.cluster_rank = block;
    fiber.shared = running.memories[static_cast<size_t>(block)].at.get();
    fiber.warp = &running.warps[static_cast<size_t>(number / kWarp)];
    fiber.of_block = &running.blocks[static_cast<size_t>(block)];
    start(fiber);
  }
  int left = count;
  while (!running.ready.empty() && running.failure.empty()) {
    std::pop_heap(running.ready.begin(), running.ready.end());
    Fiber& fiber = running.fibers[static_cast<size_t>(running.ready.back().second)];
    running.ready.pop_back();
    run_fiber(fiber);
    left -= fiber.done;
  }
  if (running.failure.empty() && left > 0)
    running.failure = std::to_string(left) + " threads wait for others in vain";
  __tsan_acquire(&running.ended);
  if (!running.failure.empty()) throw std::runtime_error("emulation: " + running.failure);
}

}  // namespace

void barrier_of_block(const char* file, int line) { barrier(*self().of_block, file, line); }
void barrier_of_cluster(const char* file, int line) {
  if (left_out(file, line)) return;
  arrive(running.cluster, true, file, line);
  wait_for_arrived(running.cluster);
}
void arrive_at_cluster(const char* file, int line) {
  if (!left_out(file, line)) arrive(running.cluster, false, file, line);
}
void wait_for_cluster(const char* file, int line) {
  if (left_out(file, line)) {
    self().arrived_turn = -1;
  } else {
    wait_for_arrived(running.cluster);
  }
}
void barrier_of_warp(const char* file, int line) { barrier(*self().warp, file, line); }

const uint32_t* exchange(uint32_t value, const char* file, int line) {
  Warp& warp = *self().warp;
  // All lanes read before the exchange after the next, which is the first to write here again.
  uint32_t* values = warp.values[warp.value_turn];
  values[lane()] = value;
  if (warp.waiting.size() + 1 == warp.size) warp.value_turn ^= 1;
  wait(warp, file, line);
  return values;
}

char* shared_memory() { return self().shared; }

char* in_leader(char* at) { return running.memories[0].at.get() + (at - self().shared); }

void run(Index grid, int threads, int shared_bytes, int cluster,
         const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (threads < 1 || threads > 1024 || threads % kWarp != 0 || shared_bytes > 99 * 1024 ||
      cluster < 1 || cluster > 8 || grid.x % static_cast<unsigned>(cluster) != 0 || grid.y > 0xffff)
    throw std::runtime_error("emulation: no GPU launches " + std::to_string(threads) +
                             " threads, " + std::to_string(shared_bytes) + " bytes, clusters of " +
                             std::to_string(cluster));
  Schedule schedule;
  const char* without = std::getenv("OPD_EMULATION_WITHOUT");
  running.without = without ? without : "";
  running.schedule = &schedule;
  running.body = &body;
  running.sanitizer_thread = __tsan_get_current_fiber();
  shape = {{static_cast<unsigned>(threads), 1}, grid, cluster};
  std::vector<std::pair<int64_t, Index>> clusters;
  for (Index first{0, 0}; first.y < grid.y; ++first.y)
    for (first.x = 0; first.x < grid.x; first.x += static_cast<unsigned>(cluster))
      clusters.emplace_back(schedule.key(static_cast<int>(clusters.size())), first);
  std::sort(clusters.begin(), clusters.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  for (const auto& [key, first] : clusters) run_cluster(first, threads, shared_bytes);
}

}  // namespace emulation
