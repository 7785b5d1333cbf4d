// The kernels with one choice changed at a time, for a GPU to compare; bfloat16 alone.
//
// The sources are the product's headers. A variant changes the type Tuning, a kernel's plan or a
// launch. variants.py builds this file as the Python module _cuda_variants and says what each variant
// is to decide.

#include "../../csrc/bindings/device.h"
#include "../../csrc/cuda/divergence.cuh"
#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/scatter.cuh"

namespace opd::cuda {
namespace {

struct CachedLoads : Product {
  __device__ static uint4 load(const uint4* address) { return *address; }
};

struct LoadsPastL1 : Product {
  __device__ static uint4 load(const uint4* address) {
#if defined(OPD_EMULATION)
    return *address;
#else
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
#endif
  }
};

struct OneChunk : Product {
  static constexpr int kChunksAtOnce = 1;
};

struct StreamingStores : Product {
  __device__ static void store(uint4* address, const uint4& value) {
#if defined(OPD_EMULATION)
    *address = value;
#else
    __stcs(address, value);
#endif
  }
};

// The read of the teacher and the group keys, of which one is written so that all are needed.
template <class Format>
__global__ void __launch_bounds__(kMaxThreads, 1)
    stream_kernel(const __grid_constant__ DivergenceArgs args, const __grid_constant__ Plan plan) {
  const Shared<Format> shared(plan, args.k);
  const Block block(shared.scratch);
  const AlignedRow<Format, Product> row(args.teacher.row(blockIdx.x),
                                        static_cast<int>(args.allowed.limit), args.allowed.banned);
  stream(block, row, 0, row.tiles(), plan.lane_bits, false, shared.keys, KeysAlone{});
  __syncthreads();
  if (block.thread == 0)
    args.loss[blockIdx.x] = static_cast<float>(shared.keys[row.tiles() - 1]);
}

// The same plan with groups of twice as many elements: the product's before they were halved.
Plan with_double_groups(Plan plan, int64_t width, int k, int size) {
  const int before = plan.key_bytes;
  plan.lane_bits = std::min(plan.lane_bits + 1, kLaneBits);
  plan.key_bytes = static_cast<int>(key_bytes(width, k, size, plan.lane_bits));
  plan.key_bytes = std::max(plan.key_bytes, div_up(kEntryBytes * k, kChunkBytes) * kChunkBytes);
  plan.shared_bytes += plan.key_bytes - before;
  if (plan.key_bytes > kMostKeyBytes) throw std::invalid_argument("groups of twice the size do not fit");
  return plan;
}

// What a launch runs on: a device, and a variant by its name.
struct Variant {
  std::string name;
  Device device;
};

void select_divergence_of(const DivergenceArgs& args, const Variant& how) {
  const std::string& variant = how.name;
  const Device& device = how.device;
  const int64_t rows = args.teacher.count, width = args.allowed.limit;
  if (args.teacher.dtype != DType::kBFloat16)
    throw std::invalid_argument("variants take a teacher's logits in bfloat16");
  if (rows == 0) return;
  Plan plan = plan_selection(rows, width, args.k, DType::kBFloat16, device);
  if (variant == "stream") plan.cluster = 1;
  if (variant == "groups_64") plan = with_double_groups(plan, width, args.k, 2);
  if (variant.rfind("threads_", 0) == 0) plan.threads = std::stoi(variant.substr(8));
  const auto run = [&](auto kernel, const auto& arguments) {
    launch(kernel, Grid{rows * plan.cluster}, plan.threads, plan.shared_bytes, plan.cluster, device,
           arguments, plan);
  };
  if (variant == "stream") return run(stream_kernel<BFloat16>, args);
  if (variant == "select")  // values go where gradients would
    return run(select_kernel<BFloat16>,
               SelectArgs{args.teacher, args.allowed, args.k, args.out_ids, args.entry_grad});
  if (variant == "loads_cached") return run(divergence_kernel<BFloat16, CachedLoads>, args);
  if (variant == "loads_past_l1") return run(divergence_kernel<BFloat16, LoadsPastL1>, args);
  if (variant == "one_chunk") return run(divergence_kernel<BFloat16, OneChunk>, args);
  run(divergence_kernel<BFloat16>, args);
}

void scatter_of(const ScatterArgs& args, const Variant& how) {
  const std::string& variant = how.name;
  constexpr int kThreads = 128;
  constexpr int64_t kSize = 2;
  const int64_t rows = args.out.count, elements = args.out.width + 16 / kSize - 1;
  if (args.out.dtype != DType::kBFloat16 || args.mode != ScatterMode::kClear)
    throw std::invalid_argument("variants clear a gradient in bfloat16");
  if (rows == 0 || args.out.width == 0) return;
  const int64_t kilobytes = variant == "pieces_256k" ? 256 : 64;
  const int64_t piece = kilobytes * 1024 / kSize;
  const auto kernel = variant == "stores_streaming" ? scatter_kernel<BFloat16, StreamingStores>
                                                    : scatter_kernel<BFloat16>;
  launch(kernel, Grid{rows, (elements + piece - 1) / piece}, kThreads, 0, 1, how.device, args,
         piece);
}

}  // namespace
}  // namespace opd::cuda

using namespace opd;

PYBIND11_MODULE(_cuda_variants, m) {
  define_arguments(m);
  define_device(m);
  py::class_<cuda::Variant>(m, "Variant", py::module_local(), "(name, device)")
      .def(py::init([](const std::string& name, const cuda::Device& device) {
        return cuda::Variant{name, device};
      }));

  define(m, "select_divergence", select_divergence_args, cuda::select_divergence_of);
  define(m, "scatter", scatter_args, cuda::scatter_of);
}
