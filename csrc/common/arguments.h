// Arguments of the primitives: named structs of pointers, sizes and strides, the same on every
// device.
#pragma once

#include <cmath>
#include <cstdint>

#include "rows.h"

namespace opd {

constexpr int kMaxK = 1024;

// One side's temperature: a value per row if `rows` is set, else one value for all rows.
struct Temperature {
  float value = 1.0f;
  const float* rows = nullptr;

  OPD_HD float at(int64_t row) const { return rows ? rows[row] : value; }
};

// A weighted sum of divergences of the student's p and the teacher's q on a support, as Python's
// Divergence (opd_kernels/divergences.py) has it.
struct Divergence {
  float reverse = 0, forward = 0, skew_reverse = 0, skew_forward = 0;
  float beta = 0.5f;
  bool stop_ratio = false;
  float log_ratio_clip = INFINITY;
  float logp_floor = -INFINITY;

  bool is_reverse_kl() const {
    return reverse == 1 && forward == 0 && skew_reverse == 0 && skew_forward == 0 && !stop_ratio &&
           log_ratio_clip == INFINITY && logp_floor == -INFINITY;
  }
};

// What becomes of the probability outside of the support.
enum class Outside { kRenormalize, kTruncate, kBucket, kGeneralize, kSample };

// What is computed on the entries of a support.
struct Objective {
  Temperature temperature;
  Temperature teacher_temperature;
  Divergence divergence;
  const float* weights = nullptr;  // (N, 4), in place of the divergence's four; or null
  Outside outside = Outside::kRenormalize;

  bool is_reverse_kl() const { return divergence.is_reverse_kl() && !weights; }
};

// What may enter the support.
struct Allowed {
  int64_t limit = 0;                 // ids in [0, limit)
  const uint64_t* banned = nullptr;  // a bit per id, in whole words, or null
  const bool* mask = nullptr;        // a flag per row, false: not read; or null

  OPD_HD bool row(int64_t index) const { return !mask || mask[index]; }
  OPD_HD bool id(int64_t id) const {
    return id >= 0 && id < limit && !(banned && ((banned[id >> 6] >> (id & 63)) & 1));
  }
};

struct SelectArgs {
  Rows logits;  // (N, V)
  Allowed allowed;
  int k;
  int32_t* ids;   // (N, K)
  float* values;  // (N, K)
};

// A softmax over the ids in [0, width) that are not listed.
struct Tail {
  int64_t width;
  Temperature temperature;
  Rows ids;           // (N, K), or no columns: those that are selected in the same pass
  double* logsumexp;  // (N), 0 in masked rows
  double* entropy;    // (N), 0 in masked rows; or null
};

struct SelectWithTailArgs {
  SelectArgs select;
  Tail tail;
};

struct TailArgs {
  Rows logits;  // (N, V)
  const bool* mask;
  Tail tail;
};

// The student's values at the ids of a support.
struct GatherArgs {
  Rows student;  // (N, V)
  Rows ids;      // (N, K)
  Allowed allowed;
  float* values;   // (N, K), 0 where absent
  int32_t* slots;  // (N, K), k or -1 where absent
};

struct DivergenceArgs {
  Rows student;  // (N, V)
  Rows teacher;  // (N, V_t) logits to select from, or (N, K) values of a given support
  Rows ids;      // (N, K) ids of a given support
  Allowed allowed;
  int k;
  Objective objective;
  float* loss;        // (N)
  int32_t* out_ids;   // (N, K), each id once, -1 where absent
  float* entry_grad;  // (N, K)
};

// The divergence with the probability outside of the support. For Outside::kSample the last id is
// the sampled token or -1, and the support has the K before it.
struct FullDivergenceArgs {
  Rows student;  // (N, V)
  Rows teacher;  // (N, K) values of the support
  Rows ids;      // (N, K)
  Allowed allowed;
  Objective objective;
  const double* teacher_tail;  // (N), of the complement of the listed ids
  const double* student_tail;  // (N), or null: computed over the ids in [0, width)
  int64_t width;
  float* loss;        // (N)
  int32_t* out_ids;   // (N, K), each id once, -1 where absent
  float* entry_grad;  // (N, K)
  float* factors;     // (N), of the student's p in the gradient outside of the entries
  double* logsumexp;  // (N), the student's, 0 in masked rows
};

// What `out` holds before scatter, and what scatter does.
enum class ScatterMode {
  kAssign,  // zeros: writes the entries
  kClear,   // anything: writes zeros, then the entries
  kAdd,     // a gradient: adds the entries
};

struct ScatterArgs {
  Rows out;                 // (N, V), any strides
  const int32_t* ids;       // (N, K)
  const float* entry_grad;  // (N, K)
  const float* upstream;    // (N)
  int k;
  ScatterMode mode;
};

// What a gradient holds where no entry is: factor softmax(z / T) for ids in [0, limit), 0 beyond.
struct BackgroundArgs {
  ScatterArgs scatter;  // kAssign: `out` is zeros; kClear: it holds anything
  Rows logits;          // (N, V), z; may be `out`
  const float* factors;  // (N); a row whose factor times upstream is 0 is not read
  const double* logsumexp;  // (N)
  int64_t limit;
  Temperature temperature;
};

// A head's logits at the ids of a support: logits[n, k] = weight[ids[n, k]] . hidden[n] + bias.
struct GatherDotArgs {
  Rows hidden;  // (N, H)
  Rows weight;  // (V, H)
  const char* bias;  // (V), or null
  DType bias_dtype;
  Rows ids;  // (N, K)
  Allowed allowed;
  int k;
  float* logits;   // (N, K), 0 where absent
  int32_t* slots;  // (N, K), k or -1 where absent
};

// Entries whose upstream gradient is 0 are not read.
struct GatherDotHiddenArgs {
  const float* upstream;  // (N, K)
  Rows ids;               // (N, K)
  Rows weight;            // (V, H)
  int k;
  Rows out;  // (N, H)
};

struct GatherDotWeightArgs {
  const float* upstream;  // (N, K)
  Rows ids;               // (N, K)
  Rows hidden;            // (N, H)
  int k;
  Rows out;  // (V, H), zeros
};

}  // namespace opd
