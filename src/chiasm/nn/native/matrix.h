// Products of activation rows with a weight matrix [n, k].
//
// Weights are float32, bfloat16, int8 with a scale for each row, or int4 with a scale for each 64 weights of a row.
// For integer weights the activations are rounded to int8 too, with a scale for each group of 128 (int8) or 64 (int4)
// of them. Every output is summed in one fixed order, whatever rows stand beside it: a row of a batch is computed as it
// is alone.
//
// float32 and bfloat16 lie row by row, as torch has them. Integers lie in panels of 16 rows, in the order in which they
// are multiplied: 64 bytes are four consecutive weights (int8; eight in int4) of each of the 16 rows, so memory is read
// from one end to the other, and the 16 sums of a vector need no adding up across it.
#pragma once
#include "numbers.h"

enum Kind : int32_t { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
constexpr int64_t PANEL = 16, MOST = 8, FEW = 4;  // outputs of a panel; activation rows that pass it at a time
constexpr int64_t AHEAD = 4096;          // bytes of weights that are fetched in advance

// Which of the passes over a panel this is. The first fetches weights some way ahead of itself; others fetch shares of the
// next panel, a line between some products, so that memory is read while the rows of this one are computed.
struct Pass {
  int64_t number, of;
};

struct Matrix {
  const void* weights;  // F32, BF16: [n] rows of `stride` bytes; INT8: [n / 16, k / 4, 16, 4]; INT4: [.., k / 8, 16, 4]
  const float* scales;  // INT8 [n], INT4 [n / 16, k / 64, 16]; otherwise null. n and k are padded to whole panels
  const float* bias;    // [n] or null
  int64_t n, k, stride;
  int32_t kind, padding;
};

static inline bool large(const Matrix& w) {  // whether a panel and the next do not fit in the first cache together
  return PANEL * w.stride > 32768;
}

// Activation rows in the form that a kind of weights is multiplied with.
struct Rows {
  int64_t k = 0, stride = 0, groups = 0, per_group = 0;
  std::vector<float> wide;      // F32: [m, stride]
  std::vector<uint16_t> half;   // BF16: [m, stride]
  std::vector<int8_t> small;    // INT8, INT4: [m, stride]
  std::vector<float> scales;    // [m, groups]
  std::vector<int32_t> starts;  // [m, groups]: cancels the offset that makes weights unsigned

  void shape(int64_t m, int64_t columns, int32_t kind) {
    k = columns;
    stride = (k + 63) / 64 * 64;
    if (kind == F32) grow(wide, m * stride);
    if (kind == BF16) grow(half, m * stride);
    if (kind == INT8 || kind == INT4) {
      per_group = kind == INT8 ? 128 : 64;
      groups = (stride + per_group - 1) / per_group;
      grow(small, m * stride);
      grow(scales, m * groups);
      grow(starts, m * groups);
    }
  }

  template <class T>
  static void grow(std::vector<T>& v, int64_t size) {
    if (int64_t(v.size()) < size) v.resize(size);
  }

  void set(int64_t row, const float* x, int32_t kind) {
    if (kind == F32) {
      float* to = wide.data() + row * stride;
      std::memcpy(to, x, k * sizeof(float));
      for (int64_t i = k; i < stride; i++) to[i] = 0;
    } else if (kind == BF16) {
      uint16_t* to = half.data() + row * stride;
      int64_t i = 0;
#ifdef WIDE
      for (; i + 16 <= k; i += 16) _mm256_storeu_si256((__m256i*)(to + i), halved(_mm512_loadu_ps(x + i)));
#endif
      for (; i < k; i++) to[i] = narrowed(x[i]);
      for (int64_t i = k; i < stride; i++) to[i] = 0;
    } else {
      rounded(row, x, kind == INT8 ? 128 : 8);
    }
  }

  void rounded(int64_t row, const float* x, int offset) {
    int8_t* to = small.data() + row * stride;
    for (int64_t g = 0; g < groups; g++) {
      const int64_t first = g * per_group, last = std::min(first + per_group, stride), end = std::min(last, k);
      float most = 0;
#pragma omp simd reduction(max : most)
      for (int64_t i = first; i < end; i++) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
      const float inverse = most > 0 ? 127.0f / most : 0.0f;
      int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = first; i < end; i++) {
        const int32_t value = int32_t(std::nearbyintf(x[i] * inverse));
        to[i] = int8_t(value);
        sum += value;
      }
      for (int64_t i = std::max(first, end); i < last; i++) to[i] = 0;
      scales[row * groups + g] = most / 127.0f;
      starts[row * groups + g] = -offset * sum;
    }
  }
};

#ifdef WIDE
// The sums of 16 vectors, each in the order of _mm512_reduce_add_ps: halves, quarters, eighths, the last two.
INLINED __m512 sums_of_16(const __m512* v) {
  __m512 four[4];
  UNROLLED for (int i = 0; i < 4; i++) {
    __m512 two[2];
    UNROLLED for (int j = 0; j < 2; j++) {
      const __m512 a = v[4 * i + 2 * j], b = v[4 * i + 2 * j + 1];
      two[j] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    four[i] = _mm512_add_ps(_mm512_shuffle_f32x4(two[0], two[1], 0x88), _mm512_shuffle_f32x4(two[0], two[1], 0xdd));
  }
  const __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(four[0], four[1]), _mm512_unpackhi_ps(four[0], four[1]));
  const __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(four[2], four[3]), _mm512_unpackhi_ps(four[2], four[3]));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xee));
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), all);
}

INLINED __m512 product(__m512 sums, __m512i ws, __m512i xs) {  // bfloat16
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sums, (__m512bh)ws, (__m512bh)xs);
#else
  const __m512i high = _mm512_set1_epi32(0xffff0000);
  const __m512 even = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(ws, 16)),
                                    _mm512_castsi512_ps(_mm512_slli_epi32(xs, 16)));
  return _mm512_add_ps(sums, _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(ws, high)),
                                             _mm512_castsi512_ps(_mm512_and_si512(xs, high)), even));
#endif
}

INLINED __m512 product(__m512 sums, __m512 ws, __m512 xs) { return _mm512_fmadd_ps(ws, xs, sums); }
INLINED __m512 some_of(const float* x, int64_t count) {
  return _mm512_maskz_loadu_ps(count >= 16 ? 0xffff : (1u << count) - 1, x);
}
INLINED __m512i some_of(const uint16_t* x, int64_t count) {
  return _mm512_maskz_loadu_epi16(count >= 32 ? 0xffffffffu : (1u << count) - 1, x);
}
INLINED __m512 all_of(const float* x) { return _mm512_loadu_ps(x); }
INLINED __m512i all_of(const uint16_t* x) { return _mm512_loadu_si512(x); }

struct Lines {  // what is to be fetched, in lines of 64 bytes
  const char *next, *end;
  INLINED_MEMBER void some(int64_t most) {
    for (int64_t i = 0; i < most && next < end; i++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
  }
};

// rows[j][i]: the vectors whose sums are the products of N weight rows and M activation rows, of float32 or bfloat16.
template <int N, int M, class T>
INLINED void tile(const T* ws, int64_t step, const T* xs, int64_t stride, int64_t k, int64_t each, Lines& lines,
                  __m512 (*rows)[PANEL]) {
  constexpr int64_t LANES = 64 / sizeof(T);
  __m512 sums[M][N];
  UNROLLED for (int j = 0; j < M; j++)
    UNROLLED for (int i = 0; i < N; i++) sums[j][i] = _mm512_setzero_ps();
  int64_t c = 0;
  for (; c + LANES <= k; c += LANES) {
    if constexpr (N == 1)
      _mm_prefetch((const char*)(ws + c) + AHEAD, _MM_HINT_T0);
    else
      lines.some(each);
    UNROLLED for (int i = 0; i < N; i++) {
      const auto weights = all_of(ws + i * step + c);
      UNROLLED for (int j = 0; j < M; j++) sums[j][i] = product(sums[j][i], weights, all_of(xs + j * stride + c));
    }
  }
  if (c < k)
    UNROLLED for (int i = 0; i < N; i++) {
      const auto weights = some_of(ws + i * step + c, k - c);
      UNROLLED for (int j = 0; j < M; j++) sums[j][i] = product(sums[j][i], weights, all_of(xs + j * stride + c));
    }
  UNROLLED for (int j = 0; j < M; j++)
    UNROLLED for (int i = 0; i < N; i++) rows[j][i] = sums[j][i];
}

// The sums of `count` weight rows and M activation rows, N weight rows side by side.
template <int N, int M, class T>
static __attribute__((noinline)) void tiles(const T* ws, int64_t step, const T* xs, int64_t stride, int64_t k,
                                            int64_t count, int64_t each, Lines lines, float* out) {
  __m512 rows[M][PANEL];
  int64_t i = 0;
  for (; i + N <= count; i += N)
    tile<N, M>(ws + i * step, step, xs, stride, k, each, lines, (__m512(*)[PANEL])&rows[0][i]);
  if constexpr (N > 1)
    for (; i < count; i++) tile<1, M>(ws + i * step, step, xs, stride, k, each, lines, (__m512(*)[PANEL])&rows[0][i]);
  for (; i < PANEL; i++)
    UNROLLED for (int j = 0; j < M; j++) rows[j][i] = _mm512_setzero_ps();
  UNROLLED for (int j = 0; j < M; j++) _mm512_storeu_ps(out + j * PANEL, sums_of_16(rows[j]));
}

// out[j * 16 + i] for `count` weight rows from `n` on and M activation rows from `m` on. The first pass reads one weight
// row after the other, as they lie in memory, which is twice as fast as four side by side; those after it find them near
// and take four, which are the fewest loads, and fetch the next panel into the second cache.
template <int M, class T>
INLINED void dense(const Matrix& w, const std::vector<T>& x, int64_t stride, int64_t n, int64_t count, int64_t m,
                   Pass pass, float* out) {
  const T *ws = (const T*)((const char*)w.weights + n * w.stride), *xs = x.data() + m * stride;
  const int64_t step = w.stride / sizeof(T);
  if (M > FEW || pass.number == 0) return tiles<1, M>(ws, step, xs, stride, w.k, count, 0, {}, out);
  const int64_t all = (PANEL * w.stride + 63) / 64, turns = pass.of - 1;
  const char *next = (const char*)(ws + PANEL * step) + all * (pass.number - 1) / turns * 64;
  const Lines lines{next, next + all / turns * 64};
  if constexpr (M <= FEW) tiles<4, M>(ws, step, xs, stride, w.k, count, (2 + turns - 1) / turns, lines, out);
}

INLINED __m512i dot4(__m512i sums, __m512i u8, __m512i s8) {
#ifdef __AVX512VNNI__
  return _mm512_dpbusd_epi32(sums, u8, s8);
#else  // exact, unlike maddubs, which saturates
  const __m512i even = _mm512_set1_epi16(0x00ff);
  const __m512i low = _mm512_madd_epi16(_mm512_and_si512(u8, even), _mm512_srai_epi16(_mm512_slli_epi16(s8, 8), 8));
  const __m512i high = _mm512_madd_epi16(_mm512_srli_epi16(u8, 8), _mm512_srai_epi16(s8, 8));
  return _mm512_add_epi32(sums, _mm512_add_epi32(low, high));
#endif
}

INLINED __m512i four_of(const int8_t* x) {  // in every lane
  int32_t bits;
  std::memcpy(&bits, x, 4);
  return _mm512_set1_epi32(bits);
}

// out[j * 16 + i] for the 16 rows of a panel of integers and M activation rows from `m` on.
template <int M, bool FOUR>
INLINED void panel(const Matrix& w, const Rows& x, int64_t number, int64_t m, Pass pass, float* out) {
  constexpr int SPLIT = M == 1 ? 4 : M == 2 ? 2 : 1;     // products in flight: one waits for the one before it
  constexpr int64_t EACH = FOUR ? 8 : 4;              // inputs of a vector of weights
  const int64_t steps = x.stride / EACH, in_group = x.per_group / EACH;
  const char* from = (const char*)w.weights + number * steps * 64;
  const float* scales = w.scales + number * PANEL * (FOUR ? x.groups : 1);
  const bool ahead = pass.of == 1;
  const char* next = from + steps * 64;
  Lines lines{next + steps * pass.number / pass.of * 64, next + steps * (pass.number + 1) / pass.of * 64};
  const __m512i nibble = _mm512_set1_epi8(15);
  const int8_t* xs[M];
  UNROLLED for (int j = 0; j < M; j++) xs[j] = x.small.data() + (m + j) * x.stride;
  __m512 sums[M];
  UNROLLED for (int j = 0; j < M; j++) sums[j] = _mm512_setzero_ps();
  for (int64_t g = 0, s = 0; g < x.groups; g++) {
    __m512i dots[SPLIT][M];
    UNROLLED for (int j = 0; j < M; j++) {
      dots[0][j] = _mm512_set1_epi32(x.starts[(m + j) * x.groups + g]);
      UNROLLED for (int i = 1; i < SPLIT; i++) dots[i][j] = _mm512_setzero_si512();
    }
    for (const int64_t end = std::min(s + in_group, steps); s < end; s += SPLIT) {
      if (!ahead) lines.some(SPLIT);
      UNROLLED for (int i = 0; i < SPLIT; i++) {
        if (ahead) _mm_prefetch(from + (s + i) * 64 + AHEAD, _MM_HINT_T0);
        const __m512i ws = _mm512_loadu_si512(from + (s + i) * 64);
        const __m512i first = FOUR ? _mm512_and_si512(ws, nibble) : ws;
        UNROLLED for (int j = 0; j < M; j++) dots[i][j] = dot4(dots[i][j], first, four_of(xs[j] + (s + i) * EACH));
        if (FOUR) {
          const __m512i second = _mm512_and_si512(_mm512_srli_epi16(ws, 4), nibble);
          UNROLLED for (int j = 0; j < M; j++)
            dots[i][j] = dot4(dots[i][j], second, four_of(xs[j] + (s + i) * EACH + 4));
        }
      }
    }
    UNROLLED for (int j = 0; j < M; j++) {
      UNROLLED for (int i = 1; i < SPLIT; i++) dots[0][j] = _mm512_add_epi32(dots[0][j], dots[i][j]);
      __m512 scale = _mm512_set1_ps(x.scales[(m + j) * x.groups + g]);
      if (FOUR) scale = _mm512_mul_ps(scale, _mm512_loadu_ps(scales + g * PANEL));
      sums[j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[0][j]), scale, sums[j]);
    }
  }
  UNROLLED for (int j = 0; j < M; j++)
    _mm512_storeu_ps(out + j * PANEL, FOUR ? sums[j] : _mm512_mul_ps(sums[j], _mm512_loadu_ps(scales)));
}
#else
template <class T>
static inline float number(T x) {
  if constexpr (sizeof(T) == 2) return widened(x);
  return x;
}

template <int M, class T>
static void dense(const Matrix& w, const std::vector<T>& x, int64_t stride, int64_t n, int64_t count, int64_t m, Pass,
                  float* out) {
  for (int64_t i = 0; i < count; i++)
    for (int j = 0; j < M; j++) {
      const T* ws = (const T*)((const char*)w.weights + (n + i) * w.stride);
      const T* xs = x.data() + (m + j) * stride;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < w.k; c++) sum += number(ws[c]) * number(xs[c]);
      out[j * PANEL + i] = sum;
    }
}

template <int M, bool FOUR>
static void panel(const Matrix& w, const Rows& x, int64_t number, int64_t m, Pass, float* out) {
  const int64_t each = FOUR ? 8 : 4, steps = x.stride / each;
  const uint8_t* from = (const uint8_t*)w.weights + number * steps * 64;
  const float* scales = w.scales + number * PANEL * (FOUR ? x.groups : 1);
  for (int j = 0; j < M; j++) {
    const int8_t* xs = x.small.data() + (m + j) * x.stride;
    float sums[PANEL] = {};
    for (int64_t g = 0; g < x.groups; g++) {
      const int64_t row = (m + j) * x.groups + g, end = std::min((g + 1) * x.per_group, x.stride) / each;
      int32_t dots[PANEL];
      for (int i = 0; i < PANEL; i++) dots[i] = x.starts[row];
      for (int64_t s = g * x.per_group / each; s < end; s++)
        for (int i = 0; i < PANEL; i++)
          for (int c = 0; c < 4; c++) {
            const uint8_t both = from[s * 64 + i * 4 + c];
            dots[i] += (FOUR ? both & 15 : both) * xs[s * each + c];
            if (FOUR) dots[i] += (both >> 4) * xs[s * each + 4 + c];
          }
      for (int i = 0; i < PANEL; i++)
        sums[i] += dots[i] * (FOUR ? x.scales[row] * scales[g * PANEL + i] : x.scales[row]);
    }
    for (int i = 0; i < PANEL; i++) out[j * PANEL + i] = FOUR ? sums[i] : sums[i] * scales[i];
  }
}
#endif

template <int M>
static inline void block_of(const Matrix& w, const Rows& x, int64_t n, int64_t count, int64_t m, Pass pass,
                            float* out) {
  switch (w.kind) {
    case F32: return dense<M>(w, x.wide, x.stride, n, count, m, pass, out);
    case BF16: return dense<M>(w, x.half, x.stride, n, count, m, pass, out);
    case INT8: return panel<M, false>(w, x, n / PANEL, m, pass, out);
    default: return panel<M, true>(w, x, n / PANEL, m, pass, out);
  }
}

// Up to 16 outputs from `n` on (for integers a whole panel) of some activation rows from `m` on, of m0 .. m1; gives how
// many rows.
static __attribute__((noinline)) int64_t block(const Matrix& w, const Rows& x, int64_t n, int64_t count, int64_t m,
                                               int64_t m0, int64_t m1, float* out) {
  // Passes of about as many rows each: 9 are 5 and 4, not 8 and 1.
  const int64_t all = m1 - m0, single = large(w) ? FEW : MOST;
  const int64_t most = w.kind >= INT8 || all <= single ? MOST : FEW, of = (all + most - 1) / most;
  const int64_t number = ((m - m0) * of + of - 1) / all, rows = all * (number + 1) / of - (m - m0);
  const Pass pass{number, of};
  switch (rows) {
    case 8: return block_of<8>(w, x, n, count, m, pass, out), 8;
    case 7: return block_of<7>(w, x, n, count, m, pass, out), 7;
    case 6: return block_of<6>(w, x, n, count, m, pass, out), 6;
    case 5: return block_of<5>(w, x, n, count, m, pass, out), 5;
    case 4: return block_of<4>(w, x, n, count, m, pass, out), 4;
    case 3: return block_of<3>(w, x, n, count, m, pass, out), 3;
    case 2: return block_of<2>(w, x, n, count, m, pass, out), 2;
    default: return block_of<1>(w, x, n, count, m, pass, out), 1;
  }
}

// `give(row, first, count, values)` for the outputs n0 .. n1, at most 16 at a time, of the activation rows m0 .. m1.
template <class Give>
static void multiply(const Matrix& w, const Rows& x, int64_t n0, int64_t n1, int64_t m0, int64_t m1, Give give) {
  alignas(64) float out[MOST * PANEL];
  for (int64_t n = w.kind >= INT8 ? n0 / PANEL * PANEL : n0; n < n1; n += PANEL) {
    // The panel stays in the first cache while all activation rows pass it.
    const int64_t first = std::max(n, n0), last = std::min(n + PANEL, n1);
    for (int64_t m = m0, done; m < m1; m += done) {
      done = block(w, x, n, last - n, m, m0, m1, out);
      for (int64_t j = 0; j < done; j++) {
        float* values = out + j * PANEL + (first - n);
        if (w.bias)
          for (int64_t i = 0; i < last - first; i++) values[i] += w.bias[first + i];
        give(m + j, first, last - first, values);
      }
    }
  }
}
