// Softmax attention on the CPU where queries, keys and values lie: tokenmix/blocks/kernels/window_attention.py without
// copies of windows.
//
// A plain C interface, so that it needs a C++ compiler and nothing of torch. Queries and keys lie in places: the
// windows of a map, or whole images; every query of a place asks all of its keys. Tokens are found through strides,
// channels lie side by side. Neighbouring queries share a vector, one query per lane, so that any number of channels
// will do and no softmax needs a sum across lanes: queries are transposed when they are read, keys and values are
// broadcast from where they lie, and outputs are transposed when they are written. Products are summed in registers,
// several keys (or channels) times several vectors of queries at a time.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

#define INLINE inline __attribute__((always_inline))

// Width of a vector, and how many vectors of queries fit the registers beside each other.
#if defined(__AVX512F__)
constexpr int BYTES = 64, COLUMNS = 4;
#elif defined(__AVX2__)
constexpr int BYTES = 32, COLUMNS = 2;
#else
constexpr int BYTES = 16, COLUMNS = 4;
#endif

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float Type __attribute__((vector_size(BYTES)));
  typedef int32_t Bits __attribute__((vector_size(BYTES)));
};
template <>
struct Vector<double> {
  typedef double Type __attribute__((vector_size(BYTES)));
  typedef int64_t Bits __attribute__((vector_size(BYTES)));
};
template <typename T>
using V = typename Vector<T>::Type;
template <typename T>
constexpr int L = BYTES / sizeof(T);

template <typename T>
INLINE V<T> load(const T* from) {
  V<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// The first n numbers, zeros behind them.
template <typename T>
INLINE V<T> load(const T* from, int64_t n) {
  if (n >= L<T>) return load(from);
  V<T> v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = from[i];
  return v;
}

template <typename T>
INLINE void store(T* to, V<T> v) {
  std::memcpy(to, &v, sizeof v);
}

template <typename T>
INLINE void store(T* to, V<T> v, int64_t n) {
  if (n >= L<T>) return store(to, v);
  for (int64_t i = 0; i < n; ++i) to[i] = v[i];
}

template <typename T>
INLINE void copy(const T* from, T* to, int64_t n) {
  int64_t i = 0;
  for (; i + L<T> / 2 <= n; i += L<T> / 2) std::memcpy(to + i, from + i, BYTES / 2);
  for (; i < n; ++i) to[i] = from[i];
}

// e^x for x <= 0, to about one unit in the last place; what is no number stays none.
INLINE V<double> exponential(V<double> x) {
  for (int i = 0; i < L<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

INLINE V<float> exponential(V<float> x) {
  // 2^y = 2^n 2^f with n whole and |f| <= 1/2: adding 1.5 * 2^23 rounds y to n, and 127 more make n the bits of the
  // exponent.
  const float whole = 12582912.0f + 127.0f;
  const V<float> least = V<float>{} - 127.0f;
  V<float> y = x * 1.44269504f;
  y = least > y ? least : y;
  const V<float> z = y + whole, f = y - (z - whole);
  V<float> p = f * 1.53458124e-4f + 1.33999309e-3f;
  p = p * f + 9.61848907e-3f;
  p = p * f + 5.55032864e-2f;
  p = p * f + 2.40226462e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.0f;
  Vector<float>::Bits n;
  std::memcpy(&n, &z, sizeof n);
  n <<= 23;
  V<float> power;
  std::memcpy(&power, &n, sizeof n);
  return p * power;
}

// One step of a transposition: exchange the blocks of `step` that lie off the diagonal of a and b.
#if defined(__clang__)
template <typename T, int step, int... i>
INLINE void exchange(V<T>& a, V<T>& b, std::integer_sequence<int, i...>) {
  const V<T> low = __builtin_shufflevector(a, b, (i & step ? L<T> + i - step : i)...);
  b = __builtin_shufflevector(a, b, (i & step ? L<T> + i : i + step)...);
  a = low;
}
#else
template <typename T, int step, int... i>
INLINE void exchange(V<T>& a, V<T>& b, std::integer_sequence<int, i...>) {
  typedef typename Vector<T>::Bits Bits;
  const V<T> low = __builtin_shuffle(a, b, Bits{(i & step ? L<T> + i - step : i)...});
  b = __builtin_shuffle(a, b, Bits{(i & step ? L<T> + i : i + step)...});
  a = low;
}
#endif

template <typename T, int step = L<T> / 2>
INLINE void transpose(V<T> (&rows)[L<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < L<T>; ++i)
    if (!(i & step)) exchange<T, step>(rows[i], rows[i + step], std::make_integer_sequence<int, L<T>>());
  if constexpr (step > 1) transpose<T, step / 2>(rows);
}

// Channels at .. at + channels - 1 of some rows, times a number, as columns of `width`.
template <typename T>
void to_columns(const T* const* rows, int64_t count, int64_t at, int64_t channels, T scale, T* columns, int64_t width) {
  for (int64_t c = 0; c < channels; c += L<T>) {
    const int64_t n = std::min<int64_t>(L<T>, channels - c);
    for (int64_t i = 0; i < count; i += L<T>) {
      V<T> block[L<T>];
#pragma GCC unroll 16
      for (int j = 0; j < L<T>; ++j) block[j] = load(rows[std::min(i + j, count - 1)] + at + c, n) * scale;
      transpose<T>(block);
      if (n == L<T>) {
#pragma GCC unroll 16
        for (int j = 0; j < L<T>; ++j) store(columns + (c + j) * width + i, block[j]);
      } else {
        for (int j = 0; j < n; ++j) store(columns + (c + j) * width + i, block[j]);
      }
    }
  }
}

// And back.
template <typename T>
void to_rows(const T* columns, int64_t width, T* const* rows, int64_t count, int64_t at, int64_t channels, T scale) {
  for (int64_t c = 0; c < channels; c += L<T>) {
    const int64_t n = std::min<int64_t>(L<T>, channels - c);
    for (int64_t i = 0; i < count; i += L<T>) {
      V<T> block[L<T>];
#pragma GCC unroll 16
      for (int j = 0; j < L<T>; ++j) block[j] = load(columns + (c + std::min<int64_t>(j, n - 1)) * width + i) * scale;
      transpose<T>(block);
      if (n == L<T> && count - i >= L<T>) {
#pragma GCC unroll 16
        for (int j = 0; j < L<T>; ++j) store(rows[i + j] + at + c, block[j]);
      } else {
        for (int64_t j = 0; j < std::min<int64_t>(L<T>, count - i); ++j) store(rows[i + j] + at + c, block[j], n);
      }
    }
  }
}

// Work on `count` things: `most` at a time, then two, then one.
template <int most = 6, typename F>
INLINE void in_blocks(int64_t count, F&& work) {
  int64_t i = 0;
  for (; i + most <= count; i += most) work(i, std::integral_constant<int, most>());
  for (; i + 2 <= count; i += 2) work(i, std::integral_constant<int, 2>());
  if (i < count) work(i, std::integral_constant<int, 1>());
}

// sums[r][j] += sum over i < count of factor(r, i) * the vector j at columns + i * width.
template <typename T, int R, int Q, typename F>
INLINE void multiply(V<T> (&sums)[R][Q], int64_t count, F&& factor, const T* columns, int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    V<T> column[Q];
#pragma GCC unroll 4
    for (int j = 0; j < Q; ++j) column[j] = load(columns + i * width + j * L<T>);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const T f = factor(r, i);
#pragma GCC unroll 4
      for (int j = 0; j < Q; ++j) sums[r][j] += f * column[j];
    }
  }
}

// To [row][query]: products of `count` rows, read at channel `at`, with the columns [channel][query], and what `finish`
// makes of them.
template <typename T, int Q, typename F>
INLINE void scores(const T* const* rows, int64_t count, int64_t at, int64_t d, const T* columns, T* to, F&& finish) {
  constexpr int64_t width = Q * L<T>;
  in_blocks(count, [&](int64_t first, auto block) __attribute__((always_inline)) {
    constexpr int R = decltype(block)::value;
    V<T> sums[R][Q] = {};
    const T* row[R];
    for (int r = 0; r < R; ++r) row[r] = rows[first + r] + at;
    multiply<T>(sums, d, [&](int r, int64_t i) { return row[r][i]; }, columns, width);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < Q; ++j) store(to + (first + r) * width + j * L<T>, finish(first + r, j, sums[r][j]));
  });
}

// To [channel][query]: rows, read at channel `at`, summed with the weights [key][query], times `scale` if there is one.
template <typename T, int Q>
void weighted(const T* const* rows, int64_t count, int64_t at, int64_t d, const T* weights, const V<T>* scale, T* to) {
  constexpr int64_t width = Q * L<T>;
  in_blocks(d, [&](int64_t first, auto block) {
    constexpr int R = decltype(block)::value;
    V<T> sums[R][Q] = {};
    multiply<T>(sums, count, [&](int r, int64_t i) { return rows[i][at + first + r]; }, weights, width);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < Q; ++j)
        store(to + (first + r) * width + j * L<T>, scale ? sums[r][j] * scale[j] : sums[r][j]);
  });
}

// Added to [key][depth] of `to`: the rows of all queries, read at channel `at`, summed with the weights [key][query].
template <typename T, int Q, int E>
INLINE void summed(const T* weights, int64_t keys, const T* const* rows, int64_t count, int64_t at, T* to,
                   int64_t depth) {
  constexpr int64_t width = Q * L<T>;
  in_blocks<E == 1 ? 2 * COLUMNS : 6>(keys, [&](int64_t first, auto block) __attribute__((always_inline)) {
    constexpr int R = decltype(block)::value;
    V<T> sums[R][E];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < E; ++j) sums[r][j] = load(to + (first + r) * depth + j * L<T>);
    const T* weight = weights + first * width;
    for (int64_t i = 0; i < count; ++i) {
      V<T> column[E];
#pragma GCC unroll 4
      for (int j = 0; j < E; ++j) column[j] = load(rows[i] + at + j * L<T>);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < E; ++j) sums[r][j] += weight[r * width + i] * column[j];
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < E; ++j) store(to + (first + r) * depth + j * L<T>, sums[r][j]);
  });
}

// Where tokens lie: maps of B images, cut into rows x columns places of height x width tokens each.
struct Places {
  int64_t rows, columns, height, width, image, row, column;

  int64_t count() const { return height * width; }
  int64_t find(int64_t place, int64_t n) const {
    const int64_t b = place / (rows * columns), r = place / columns % rows, c = place % columns;
    return b * image + (r * height + n / width) * row + (c * width + n % width) * column;
  }
  template <typename T>
  void list(T* base, int64_t place, int64_t first, int64_t count, T** to) const {
    T* line = base + find(place, first - first % width);
    for (int64_t i = 0, j = first % width; i < count; ++i) {
      to[i] = line + j * column;
      if (++j == width) j = 0, line += row;
    }
  }
};

// All there is to a call. The token `extra` asks in every place, as the last of its queries.
template <typename T>
struct Call {
  const T *q, *k, *v, *extra, *bias;
  int64_t B, heads, d, shift, threads, bias_head, bias_key;
  Places at_q, at_k, at_v, at_grad, at_queries, at_keys;  // the last two are those of results, without gaps
  const T* bias_end;

  // `numbers` as tokenmix/fast/window_attention.py lists them.
  Call(const T* q, const T* k, const T* v, const T* extra, const T* bias, const int64_t* numbers)
      : q(q), k(k), v(v), extra(extra), bias(bias) {
    auto next = [&] { return *numbers++; };
    B = next(), heads = next(), d = next(), shift = next(), threads = next(), bias_head = next(), bias_key = next();
    const int64_t rows = next(), columns = next();
    auto places = [&](int64_t height, int64_t width) {
      return Places{rows, columns, height, width, rows * height * columns * width * C(), columns * width * C(), C()};
    };
    auto strided = [&](Places at) {
      at.image = next(), at.row = next(), at.column = next();
      return at;
    };
    int64_t height = next(), width = next();
    at_queries = places(height, width);
    height = next(), width = next();
    at_keys = places(height, width);
    at_q = strided(at_queries), at_k = strided(at_keys), at_v = strided(at_keys), at_grad = strided(at_queries);
    bias_end = bias + (heads - 1) * bias_head + (keys() - 1) * bias_key + queries();
  }

  int64_t C() const { return heads * d; }
  int64_t places() const { return B * at_q.rows * at_q.columns; }
  int64_t queries() const { return at_q.count() + (extra != nullptr); }
  int64_t keys() const { return at_k.count(); }
  int64_t depth() const { return (d + L<T> - 1) / L<T> * L<T>; }  // channels of a head in whole vectors
  T scale() const { return T(1) / std::sqrt(T(d)); }
  // Heads that are done together: such that their channels fill vectors, where few do.
  int64_t group() const {
    int64_t n = 1;
    while (n < 8 && n < heads && n * d % L<T>) ++n;
    return n * d % L<T> ? std::min<int64_t>(heads, 8) : n;
  }
  int64_t groups() const { return (heads + group() - 1) / group(); }
  // Queries that are done together, and how many vectors they fill.
  static constexpr int64_t panel = COLUMNS * L<T>;
  int64_t panels() const { return (queries() + panel - 1) / panel; }
  int64_t threads_for(int64_t tasks) const { return std::max<int64_t>(std::min(threads, tasks), 1); }
};

// Memory that holds anything at first. Where that goes through arithmetic it is filled: tiny numbers are slow.
template <typename T>
struct Buffer {
  std::unique_ptr<T[]> memory;
  void reserve(int64_t count) { memory.reset(new T[count]); }
  T* data() const { return memory.get(); }
  T& operator[](int64_t i) const { return memory[i]; }
};

// Memory of one thread.
template <typename T>
struct Scratch {
  Buffer<const T*> q, k, v, grad, own_q, own_grad;
  Buffer<T*> y, grad_k, grad_v;
  Buffer<T> queries, outputs, grads, weights, slopes, sums_k, sums_v, part_q, part_k, rows_q, rows_grad;
  bool parted = false;

  Scratch(const Call<T>& m, bool backward) {
    const int64_t width = m.panel, keys = m.keys(), channels = m.group() * m.d;
    q.reserve(width), k.reserve(keys), v.reserve(keys), y.reserve(width);
    queries.reserve(channels * width), outputs.reserve(channels * width), weights.reserve(keys * width);
    part_q.reserve(width), part_k.reserve(keys);
    if (backward) {
      grad.reserve(width), grad_k.reserve(keys), grad_v.reserve(keys);
      grads.reserve(channels * width), slopes.reserve(keys * width);
      sums_k.reserve(m.group() * keys * m.depth()), sums_v.reserve(m.group() * keys * m.depth());
      rows_q.reserve(width * m.depth()), rows_grad.reserve(width * m.depth());
      std::fill_n(rows_q.data(), width * m.depth(), T(0)), std::fill_n(rows_grad.data(), width * m.depth(), T(0));
      own_q.reserve(width), own_grad.reserve(width);
    }
  }

  void read_keys(const Call<T>& m, int64_t place) {
    m.at_k.list(m.k, place, 0, m.keys(), k.data());
    m.at_v.list(m.v, place, 0, m.keys(), v.data());
  }

  // Pointers to the queries of a panel (the rows of `y` likewise), the extra one last.
  template <typename R>
  static void list(const Call<T>& m, const Places& at, R* base, R* extra, int64_t place, int64_t first, int64_t count,
                   R** to) {
    const int64_t inside = std::min(count, at.count() - first);
    at.list(base, place, first, inside, to);
    if (inside < count) to[inside] = extra;
  }

  // Which of the four parts of a rolled map the tokens of a window come from, where there is more than one.
  void read_parts(const Call<T>& m, int64_t place, int64_t first, int64_t count) {
    const Places& at = m.at_q;
    const int64_t r = place / at.columns % at.rows, c = place % at.columns;
    const bool below = at.rows > 1 && r == at.rows - 1, beside = at.columns > 1 && c == at.columns - 1;
    parted = m.shift > 0 && (below || beside);
    if (!parted) return;
    auto part = [&](int64_t n) {
      return T(2 * (below && n / at.width >= at.height - m.shift) + (beside && n % at.width >= at.width - m.shift));
    };
    for (int64_t n = 0; n < m.keys(); ++n) part_k[n] = part(n);
    for (int64_t n = 0; n < count; ++n) part_q[n] = part(first + n);
  }
};

// Weights [key][query] of one head before they are divided by their sum; `inverse` is one over the sums.
template <typename T, int Q>
void weigh(const Call<T>& m, Scratch<T>& s, int64_t head, int64_t local, int64_t first, V<T> (&inverse)[Q]) {
  constexpr int64_t width = Q * L<T>;
  const int64_t keys = m.keys();
  T* weights = s.weights.data();
  V<T> most[Q], total[Q] = {};
  for (int j = 0; j < Q; ++j) most[j] = V<T>{} - std::numeric_limits<T>::infinity();
  const T* bias = m.bias ? m.bias + head * m.bias_head + first : nullptr;
  auto finish = [&](int64_t key, int j, V<T> score) __attribute__((always_inline)) {
    if (bias) {
      // What is read behind a row belongs to no query; behind the last row there is nothing to read.
      const T* from = bias + key * m.bias_key + j * L<T>;
      score += load(from, m.bias_end - from);
    }
    if (s.parted) score += load(s.part_q.data() + j * L<T>) != s.part_k[key] ? V<T>{} - T(100) : V<T>{};
    most[j] = most[j] < score ? score : most[j];
    return score;
  };
  scores<T, Q>(s.k.data(), keys, head * m.d, m.d, s.queries.data() + local * m.d * width, weights, finish);
  for (int64_t key = 0; key < keys; ++key) {
#pragma GCC unroll 4
    for (int j = 0; j < Q; ++j) {
      T* at = weights + key * width + j * L<T>;
      const V<T> weight = exponential(load(at) - most[j]);
      total[j] += weight;
      store(at, weight);
    }
  }
  for (int j = 0; j < Q; ++j) inverse[j] = T(1) / total[j];
}

template <typename T, int Q>
void forward_panel(const Call<T>& m, Scratch<T>& s, int64_t first, int64_t count, int64_t head, int64_t end) {
  constexpr int64_t width = Q * L<T>;
  const int64_t at = head * m.d, channels = (end - head) * m.d;
  to_columns(s.q.data(), count, at, channels, m.scale(), s.queries.data(), width);
  for (int64_t h = head; h < end; ++h) {
    V<T> inverse[Q];
    weigh<T, Q>(m, s, h, h - head, first, inverse);
    weighted<T, Q>(s.v.data(), m.keys(), h * m.d, m.d, s.weights.data(), inverse,
                   s.outputs.data() + (h - head) * m.d * width);
  }
  to_rows(s.outputs.data(), width, s.y.data(), count, at, channels, T(1));
}

// Rows that may be read in whole vectors from channel `at`: those of the tensor, or copies where it ends before.
template <typename T>
const T* const* wide_rows(const Call<T>& m, const Buffer<const T*>& rows, int64_t count, int64_t* at,
                          const Buffer<T>& copies, const Buffer<const T*>& own) {
  if (*at + m.depth() <= m.C()) return rows.data();
  for (int64_t i = 0; i < count; ++i) {
    own[i] = copies.data() + i * m.depth();
    std::copy(rows[i] + *at, rows[i] + *at + m.d, copies.data() + i * m.depth());
  }
  *at = 0;
  return own.data();
}

template <typename T, int Q>
void sum_rows(const Call<T>& m, const T* weights, const T* const* rows, int64_t count, int64_t at, T* to) {
  const int64_t depth = m.depth();
  int64_t e = 0;
  for (; e + 2 * L<T> <= depth; e += 2 * L<T>)
    summed<T, Q, 2>(weights, m.keys(), rows, count, at + e, to + e, depth);
  if (e < depth) summed<T, Q, 1>(weights, m.keys(), rows, count, at + e, to + e, depth);
}

// With P the weights and dP = grad v^T: dS = P (dP - sum over keys of P dP), grad_q = scale dS k,
// grad_k = scale dS^T q, grad_v = P^T grad, and dS is the gradient of the bias. `held` sums that up,
// [head][key][query], queries to the end of the last panel.
template <typename T, int Q>
void backward_panel(const Call<T>& m, Scratch<T>& s, int64_t first, int64_t count, int64_t head, int64_t end, T* held) {
  constexpr int64_t width = Q * L<T>;
  const int64_t keys = m.keys(), channels = (end - head) * m.d;
  to_columns(s.q.data(), count, head * m.d, channels, m.scale(), s.queries.data(), width);
  to_columns(s.grad.data(), count, head * m.d, channels, T(1), s.grads.data(), width);
  T *weights = s.weights.data(), *slopes = s.slopes.data();
  const T scale = m.scale();
  for (int64_t h = head; h < end; ++h) {
    const int64_t local = h - head, at = h * m.d;
    V<T> inverse[Q], total[Q] = {};
    weigh<T, Q>(m, s, h, local, first, inverse);
    scores<T, Q>(s.v.data(), keys, at, m.d, s.grads.data() + local * m.d * width, slopes,
                 [](int64_t, int, V<T> slope) { return slope; });
    for (int64_t i = 0; i < keys * Q; i += Q) {
#pragma GCC unroll 4
      for (int j = 0; j < Q; ++j) {
        const V<T> weight = load(weights + (i + j) * L<T>) * inverse[j];
        store(weights + (i + j) * L<T>, weight);
        total[j] += weight * load(slopes + (i + j) * L<T>);
      }
    }
    T* hold = held ? held + h * keys * m.panels() * m.panel + first : nullptr;
    for (int64_t key = 0; key < keys; ++key) {
#pragma GCC unroll 4
      for (int j = 0; j < Q; ++j) {
        const int64_t i = (key * Q + j) * L<T>;
        const V<T> slope = load(weights + i) * (load(slopes + i) - total[j]);
        store(slopes + i, slope * scale);
        if (hold) {
          T* to = hold + key * m.panels() * m.panel + j * L<T>;
          store(to, load(to) + slope);
        }
      }
    }
    T* outputs = s.outputs.data() + local * m.d * width;
    weighted<T, Q>(s.k.data(), keys, at, m.d, slopes, static_cast<V<T>*>(nullptr), outputs);
    int64_t from = at;
    const T* const* rows = wide_rows(m, s.grad, count, &from, s.rows_grad, s.own_grad);
    sum_rows<T, Q>(m, weights, rows, count, from, s.sums_v.data() + local * keys * m.depth());
    from = at;
    rows = wide_rows(m, s.q, count, &from, s.rows_q, s.own_q);
    sum_rows<T, Q>(m, slopes, rows, count, from, s.sums_k.data() + local * keys * m.depth());
  }
  to_rows(s.outputs.data(), width, s.y.data(), count, head * m.d, channels, T(1));
}

template <typename T, typename F>
void with_columns(int64_t count, F&& work) {
  static_assert(COLUMNS <= 4, "see the cases");
  switch ((count + L<T> - 1) / L<T>) {
    case 1: return work(std::integral_constant<int, 1>());
    case 2: return work(std::integral_constant<int, 2>());
    case 3: return work(std::integral_constant<int, std::min(3, COLUMNS)>());
    default: return work(std::integral_constant<int, COLUMNS>());
  }
}

template <typename T>
void forward(const Call<T>& m, T* y, T* tokens) {
  const int64_t groups = m.groups(), panels = m.panels(), tasks = m.places() * panels * groups;
  const int64_t threads = m.threads_for(tasks);
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t t = 0; t < threads; ++t) {
    Scratch<T> s(m, false);
    int64_t before = -1;
    for (int64_t task = tasks * t / threads; task < tasks * (t + 1) / threads; ++task) {
      const int64_t place = task / (panels * groups), first = task / groups % panels * m.panel;
      const int64_t head = task % groups * m.group(), end = std::min(m.heads, head + m.group());
      const int64_t count = std::min(m.panel, m.queries() - first);
      if (task / groups != before) {
        s.read_keys(m, place);
        s.list(m, m.at_q, m.q, m.extra, place, first, count, s.q.data());
        s.list(m, m.at_queries, y, tokens + place * m.C(), place, first, count, s.y.data());
        s.read_parts(m, place, first, count);
        before = task / groups;
      }
      with_columns<T>(count, [&](auto Q) { forward_panel<T, decltype(Q)::value>(m, s, first, count, head, end); });
    }
  }
}

template <typename T>
void backward(const Call<T>& m, const T* grad, const T* grad_tokens, T* grad_q, T* grad_k, T* grad_v, T* grad_extra,
              T* grad_bias) {
  const int64_t groups = m.groups(), tasks = m.places() * groups, keys = m.keys(), depth = m.depth();
  const int64_t threads = m.threads_for(tasks);
  const int64_t size = m.heads * keys * m.panels() * m.panel;
  std::vector<T> held(grad_bias ? size * threads : 0);
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t t = 0; t < threads; ++t) {
    Scratch<T> s(m, true);
    int64_t before = -1;
    for (int64_t task = tasks * t / threads; task < tasks * (t + 1) / threads; ++task) {
      const int64_t place = task / groups;
      const int64_t head = task % groups * m.group(), end = std::min(m.heads, head + m.group());
      if (place != before) {
        s.read_keys(m, place);
        m.at_keys.list(grad_k, place, 0, keys, s.grad_k.data());
        m.at_keys.list(grad_v, place, 0, keys, s.grad_v.data());
        before = place;
      }
      std::fill_n(s.sums_k.data(), (end - head) * keys * depth, T(0));
      std::fill_n(s.sums_v.data(), (end - head) * keys * depth, T(0));
      for (int64_t first = 0; first < m.queries(); first += m.panel) {
        const int64_t count = std::min(m.panel, m.queries() - first);
        s.list(m, m.at_q, m.q, m.extra, place, first, count, s.q.data());
        s.list(m, m.at_grad, grad, grad_tokens + place * m.C(), place, first, count, s.grad.data());
        s.list(m, m.at_queries, grad_q, grad_extra + place * m.C(), place, first, count, s.y.data());
        s.read_parts(m, place, first, count);
        with_columns<T>(count, [&](auto Q) {
          backward_panel<T, decltype(Q)::value>(m, s, first, count, head, end, grad_bias ? &held[size * t] : nullptr);
        });
      }
      for (int64_t h = head; h < end; ++h)
        for (int64_t key = 0; key < keys; ++key) {
          const int64_t from = ((h - head) * keys + key) * depth;
          copy(s.sums_k.data() + from, s.grad_k[key] + h * m.d, m.d);
          copy(s.sums_v.data() + from, s.grad_v[key] + h * m.d, m.d);
        }
    }
  }
  if (!grad_bias) return;
  // [head][key][query] of all threads, in their order, to [head][query][key].
  const int64_t width = m.panels() * m.panel, queries = m.queries();
#pragma omp parallel for num_threads(int(threads)) schedule(static)
  for (int64_t h = 0; h < m.heads; ++h)
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t n = 0; n < queries; ++n) {
        T total = 0;
        for (int64_t t = 0; t < threads; ++t) total += held[size * t + (h * keys + key) * width + n];
        grad_bias[(h * queries + n) * keys + key] = total;
      }
}

}  // namespace

#define EXPORT(T, suffix)                                                                                              \
  extern "C" void window_attention_forward_##suffix(const T* q, const T* k, const T* v, const T* extra, const T* bias, \
                                                    T* y, T* tokens, const int64_t* numbers) {                         \
    forward(Call<T>(q, k, v, extra, bias, numbers), y, tokens);                                                        \
  }                                                                                                                    \
  extern "C" void window_attention_backward_##suffix(                                                                  \
      const T* q, const T* k, const T* v, const T* extra, const T* bias, const T* grad, const T* grad_tokens,          \
      T* grad_q, T* grad_k, T* grad_v, T* grad_extra, T* grad_bias, const int64_t* numbers) {                          \
    backward(Call<T>(q, k, v, extra, bias, numbers), grad, grad_tokens, grad_q, grad_k, grad_v, grad_extra,            \
             grad_bias);                                                                                               \
  }

EXPORT(float, float32)
EXPORT(double, float64)
