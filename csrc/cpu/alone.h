// A team of one thread, as common/divergence.h describes teams. Sums over the K entries are
// accumulated in double, which costs nothing beside the teacher's row.
#pragma once

#include <algorithm>

namespace opd::cpu {

struct Alone {
  using Real = double;

  template <class Body>
  void for_entries(int k, const Body& body) const {
    for (int i = 0; i < k; ++i) body(i);
  }

  // Steps are loops of their own: the compiler makes vectors of those that only calculate.
  template <class... Steps>
  void in_steps(int k, const Steps&... steps) const {
    constexpr int kAtOnce = 64;
    float notes[kAtOnce];
    for (int begin = 0; begin < k; begin += kAtOnce) {
      const int count = std::min(kAtOnce, k - begin);
      const auto run = [&](const auto& step) {
        for (int i = 0; i < count; ++i) step(begin + i, notes[i]);
      };
      (run(steps), ...);
    }
  }

  template <class Value, class Combine>
  Value combine(const Value& value, const Combine&) const {
    return value;
  }

  template <class Make>
  auto once(const Make& make) const {
    return make();
  }
};

}  // namespace opd::cpu
