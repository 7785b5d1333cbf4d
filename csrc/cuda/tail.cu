// Launches the tails, alone or with a selection in the same read.

#include "tail.cuh"

#include "launch.h"

namespace opd::cuda {

namespace {

template <class Format>
auto kernel_of(bool entropy) {
  return entropy ? tail_kernel<true, Format> : tail_kernel<false, Format>;
}

// Returns false if the selection does not fit into shared memory beside the tail.
bool launch_tail(const SelectWithTailArgs& args, const Device& device) {
  const SelectArgs& select = args.select;
  const DType dtype = select.logits.dtype;
  const int64_t given = args.tail.ids.width;
  const int listed = given > 0 ? static_cast<int>(given) : select.k;
  TailPlan plan = plan_tail(args, listed, device);
  const Plan& blocks = plan.selection;
  if (blocks.shared_bytes > kMostShared) return false;
  const bool entropy = args.tail.entropy != nullptr;
  const auto kernel = dtype == DType::kFloat32   ? kernel_of<Float32>(entropy)
                      : dtype == DType::kFloat16 ? kernel_of<Float16>(entropy)
                                                 : kernel_of<BFloat16>(entropy);
  const int tiles = most_tiles(args.tail.width, element_size(dtype));
  const Grid grid{select.logits.count * blocks.cluster};
  do {
    launch(kernel, grid, blocks.threads, blocks.shared_bytes, blocks.cluster, device, args, plan);
    plan.first += kSegmentTiles;
  } while (plan.first < tiles);
  return true;
}

}  // namespace

void tail_logsumexp(const TailArgs& args, const Device& device) {
  if (args.logits.count == 0) return;
  SelectArgs nothing{};
  nothing.logits = args.logits;
  nothing.allowed.mask = args.mask;
  launch_tail({nothing, args.tail}, device);
}

// Very wide rows with many ids are read twice, with the same bits.
void select_with_tail(const SelectWithTailArgs& args, const Device& device) {
  const SelectArgs& to = args.select;
  if (to.logits.count == 0 || launch_tail(args, device)) return;
  select(to, device);
  Tail tail = args.tail;
  if (tail.ids.width == 0)
    tail.ids = make_rows(reinterpret_cast<uintptr_t>(to.ids), DType::kInt32,
                         {to.logits.count, to.k}, {to.k, 1});
  tail_logsumexp({to.logits, to.allowed.mask, tail}, device);
}

}  // namespace opd::cuda
