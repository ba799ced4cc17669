// The best tokens of every image in front, both parts in the order of positions: token_partition of
// tokenmix/blocks/kernels/token_order.py without sorting.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

namespace {

// A number as an integer of the same order; NaN comes behind every number, and both zeros are one.
inline uint32_t key(float x) {
  uint32_t bits;
  x += 0.0f;  // -0 + 0 = +0
  std::memcpy(&bits, &x, sizeof bits);
  return x != x ? ~uint32_t(0) : bits >> 31 ? ~bits : bits | (uint32_t(1) << 31);
}

inline uint64_t key(double x) {
  uint64_t bits;
  x += 0.0;
  std::memcpy(&bits, &x, sizeof bits);
  return x != x ? ~uint64_t(0) : bits >> 63 ? ~bits : bits | (uint64_t(1) << 63);
}

template <typename T>
void partition(const T* scores, int64_t* order, int64_t B, int64_t N, int64_t first, int threads) {
  using Key = decltype(key(T()));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && B > 1)
  for (int64_t b = 0; b < B; ++b) {
    std::vector<Key> keys(N), sorted;
    for (int64_t i = 0; i < N; ++i) keys[i] = key(scores[b * N + i]);
    Key least = 0;       // of those in front
    int64_t equal = 0;   // how many tokens with this score are in front
    if (first > 0 && first < N) {
      sorted = keys;
      std::nth_element(sorted.begin(), sorted.begin() + (first - 1), sorted.end(), std::greater<Key>());
      least = sorted[first - 1];
      equal = first - std::count_if(keys.begin(), keys.end(), [least](Key x) { return x > least; });
    } else {
      equal = first;  // all or none
      std::fill(keys.begin(), keys.end(), least);
    }
    int64_t *front = order + b * N, *back = front + first;
    for (int64_t i = 0; i < N; ++i) {
      const bool is_front = keys[i] > least || (keys[i] == least && equal-- > 0);
      *(is_front ? front : back)++ = i;
    }
  }
}

}  // namespace

#define EXPORT(T, suffix)                                                                                            \
  extern "C" void token_partition_##suffix(const T* scores, int64_t* order, int64_t B, int64_t N, int64_t first,     \
                                           int threads) {                                                            \
    partition<T>(scores, order, B, N, first, threads);                                                               \
  }

EXPORT(float, float32)
EXPORT(double, float64)
