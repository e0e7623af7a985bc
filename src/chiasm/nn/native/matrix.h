// Products of few activation rows with a weight matrix [n, k] stored row by row, as decoding needs them.
//
// Weights are float32, bfloat16, int8 with a scale for each row, or int4 with a scale for each 64 weights of a row.
// For integer weights the activations are rounded to int8 too, with a scale for each group of 64 or 128 of them. Every
// output is summed in one fixed order, whatever rows stand beside it: a row of a batch is computed as it is alone.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define WIDE 1
#define UNROLLED _Pragma("GCC unroll 16")  // or the sums of a tile would not stay in registers
#define INLINED static inline __attribute__((always_inline))
#endif

enum Kind : int32_t { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

struct Matrix {
  const void* weights;   // [n] rows of `stride` bytes
  const float* scales;   // INT8 [n], INT4 [n, k / 64]; otherwise null
  const float* bias;     // [n] or null
  int64_t n, k, stride;
  int32_t kind, padding;
};

static inline float widened(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

static inline uint16_t narrowed(float x) {  // to the nearest bfloat16, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Activation rows in the form that a kind of weights is multiplied with.
struct Rows {
  int64_t k = 0, stride = 0, groups = 0, per_group = 0;
  std::vector<float> wide;      // F32: [m, stride]
  std::vector<uint16_t> half;   // BF16: [m, stride]
  std::vector<int8_t> small;    // INT8, INT4: [m, stride]
  std::vector<float> scales;    // [m, groups]
  std::vector<int32_t> starts;  // [m, groups, 16]: cancels the offset that makes weights unsigned

  void shape(int64_t m, int64_t columns, int32_t kind) {
    k = columns;
    stride = (k + 63) / 64 * 64;
    if (kind == F32) grow(wide, m * stride);
    if (kind == BF16) grow(half, m * stride);
    if (kind == INT8 || kind == INT4) {
      per_group = kind == INT8 ? 2 : 1;
      groups = (stride / 64 + per_group - 1) / per_group;
      grow(small, m * stride);
      grow(scales, m * groups);
      grow(starts, m * groups * 16);
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
      for (int64_t i = 0; i < k; i++) to[i] = narrowed(x[i]);
      for (int64_t i = k; i < stride; i++) to[i] = 0;
    } else {
      rounded(row, x, kind == INT8 ? 128 : 8);
    }
  }

  void rounded(int64_t row, const float* x, int offset) {
    int8_t* to = small.data() + row * stride;
    for (int64_t g = 0; g < groups; g++) {
      const int64_t first = g * per_group * 64;
      const int64_t last = first + per_group * 64 < stride ? first + per_group * 64 : stride;
      const int64_t end = last < k ? last : k;
      float most = 0;
#pragma omp simd reduction(max : most)
      for (int64_t i = first; i < end; i++) most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
      const float inverse = most > 0 ? 127.0f / most : 0.0f;
      scales[row * groups + g] = most / 127.0f;
#pragma omp simd
      for (int64_t i = first; i < end; i++) to[i] = int8_t(int32_t(std::nearbyintf(x[i] * inverse)));
      for (int64_t i = end < first ? first : end; i < last; i++) to[i] = 0;
      int32_t* lanes = starts.data() + (row * groups + g) * 16;
      for (int lane = 0; lane < 16; lane++) {
        int32_t sum = 0;
        for (int64_t i = first + 4 * lane; i < last; i += 64) sum += to[i] + to[i + 1] + to[i + 2] + to[i + 3];
        lanes[lane] = -offset * sum;
      }
    }
  }
};

#ifdef WIDE
// The sums of 16 vectors, each in the order of _mm512_reduce_add_ps: halves, quarters, eighths, the last two.
INLINED void sums_of_16(const __m512* v, float* out) {
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
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_ps(out, _mm512_permutexvar_ps(order, all));
}

template <int N, int M>
INLINED void summed(const __m512 (&v)[N][M], float* out) {
  if constexpr (N * M == 16) {
    __m512 flat[16];
    UNROLLED for (int i = 0; i < 16; i++) flat[i] = v[i / M][i % M];
    sums_of_16(flat, out);
  } else {
    UNROLLED for (int i = 0; i < N; i++)
      UNROLLED for (int j = 0; j < M; j++) out[i * M + j] = _mm512_reduce_add_ps(v[i][j]);
  }
}
#endif

// Each `tile` computes out[i * M + j] for N weight rows from `n` on and M activation rows from `m` on.
#ifdef WIDE
template <int N, int M>
static inline void tile_f32(const Matrix& w, const Rows& x, int64_t n, int64_t m, float* out) {
  const float* rows = (const float*)((const char*)w.weights + n * w.stride);
  const int64_t step = w.stride / 4;
  __m512 sums[N][M];
  UNROLLED for (int i = 0; i < N; i++)
    UNROLLED for (int j = 0; j < M; j++) sums[i][j] = _mm512_setzero_ps();
  for (int64_t c = 0; c < w.k; c += 16) {
    const __mmask16 some = w.k - c >= 16 ? 0xffff : (1u << (w.k - c)) - 1;
    __m512 xs[M];
    UNROLLED for (int j = 0; j < M; j++) xs[j] = _mm512_loadu_ps(x.wide.data() + (m + j) * x.stride + c);
    UNROLLED for (int i = 0; i < N; i++) {
      const __m512 ws = _mm512_maskz_loadu_ps(some, rows + i * step + c);
      UNROLLED for (int j = 0; j < M; j++) sums[i][j] = _mm512_fmadd_ps(ws, xs[j], sums[i][j]);
    }
  }
  summed<N, M>(sums, out);
}

template <int N, int M>
static inline void tile_bf16(const Matrix& w, const Rows& x, int64_t n, int64_t m, float* out) {
  const uint16_t* rows = (const uint16_t*)((const char*)w.weights + n * w.stride);
  const int64_t step = w.stride / 2;
  __m512 sums[N][M];
  UNROLLED for (int i = 0; i < N; i++)
    UNROLLED for (int j = 0; j < M; j++) sums[i][j] = _mm512_setzero_ps();
  for (int64_t c = 0; c < w.k; c += 32) {
    const __mmask32 some = w.k - c >= 32 ? 0xffffffffu : (1u << (w.k - c)) - 1;
    __m512i xs[M];
    UNROLLED for (int j = 0; j < M; j++) xs[j] = _mm512_loadu_si512(x.half.data() + (m + j) * x.stride + c);
    UNROLLED for (int i = 0; i < N; i++) {
      const __m512i ws = _mm512_maskz_loadu_epi16(some, rows + i * step + c);
      UNROLLED for (int j = 0; j < M; j++) {
#ifdef __AVX512BF16__
        sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)ws, (__m512bh)xs[j]);
#else
        const __m512i high = _mm512_set1_epi32(0xffff0000);
        const __m512 even = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(ws, 16)),
                                          _mm512_castsi512_ps(_mm512_slli_epi32(xs[j], 16)));
        sums[i][j] = _mm512_add_ps(
            sums[i][j], _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(ws, high)),
                                        _mm512_castsi512_ps(_mm512_and_si512(xs[j], high)), even));
#endif
      }
    }
  }
  summed<N, M>(sums, out);
}

static inline __m512i dot4(__m512i sums, __m512i u8, __m512i s8) {
#ifdef __AVX512VNNI__
  return _mm512_dpbusd_epi32(sums, u8, s8);
#else  // exact, unlike maddubs, which saturates
  const __m512i even = _mm512_set1_epi16(0x00ff);
  const __m512i low = _mm512_madd_epi16(_mm512_and_si512(u8, even), _mm512_srai_epi16(_mm512_slli_epi16(s8, 8), 8));
  const __m512i high = _mm512_madd_epi16(_mm512_srli_epi16(u8, 8), _mm512_srai_epi16(s8, 8));
  return _mm512_add_epi32(sums, _mm512_add_epi32(low, high));
#endif
}

template <int N, int M, bool FOUR>
static inline void tile_int(const Matrix& w, const Rows& x, int64_t n, int64_t m, float* out) {
  const char* rows = (const char*)w.weights + n * w.stride;
  const int64_t blocks = x.stride / 64;
  const __m512i flip = _mm512_set1_epi8((char)0x80), nibble = _mm512_set1_epi8(15);
  __m512 sums[N][M];
  UNROLLED for (int i = 0; i < N; i++)
    UNROLLED for (int j = 0; j < M; j++) sums[i][j] = _mm512_setzero_ps();
  for (int64_t g = 0, b = 0; g < x.groups; g++) {
    __m512i dots[N][M];
    UNROLLED for (int j = 0; j < M; j++) {
      const __m512i start = _mm512_loadu_si512(x.starts.data() + ((m + j) * x.groups + g) * 16);
      UNROLLED for (int i = 0; i < N; i++) dots[i][j] = start;
    }
    for (const int64_t end = b + x.per_group < blocks ? b + x.per_group : blocks; b < end; b++) {
      __m512i xs[M];
      UNROLLED for (int j = 0; j < M; j++) xs[j] = _mm512_loadu_si512(x.small.data() + (m + j) * x.stride + b * 64);
      UNROLLED for (int i = 0; i < N; i++) {
        __m512i ws;
        if (FOUR) {  // weights 0..31 of a group are the low halves of its 32 bytes, 32..63 the high ones
          const __m256i both = _mm256_loadu_si256((const __m256i*)(rows + i * w.stride + b * 32));
          ws = _mm512_and_si512(
              _mm512_inserti64x4(_mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1), nibble);
        } else {
          ws = _mm512_xor_si512(_mm512_loadu_si512(rows + i * w.stride + b * 64), flip);
        }
        UNROLLED for (int j = 0; j < M; j++) dots[i][j] = dot4(dots[i][j], ws, xs[j]);
      }
    }
    UNROLLED for (int j = 0; j < M; j++) {
      const float of_rows = x.scales[(m + j) * x.groups + g];
      UNROLLED for (int i = 0; i < N; i++) {
        const float scale = FOUR ? of_rows * w.scales[(n + i) * x.groups + g] : of_rows;
        sums[i][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[i][j]), _mm512_set1_ps(scale), sums[i][j]);
      }
    }
  }
  summed<N, M>(sums, out);
  UNROLLED for (int i = 0; !FOUR && i < N; i++)
    UNROLLED for (int j = 0; j < M; j++) out[i * M + j] *= w.scales[n + i];
}
#else
template <int N, int M>
static inline void tile_f32(const Matrix& w, const Rows& x, int64_t n, int64_t m, float* out) {
  for (int i = 0; i < N; i++)
    for (int j = 0; j < M; j++) {
      const float* ws = (const float*)((const char*)w.weights + (n + i) * w.stride);
      const float* xs = x.wide.data() + (m + j) * x.stride;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < w.k; c++) sum += ws[c] * xs[c];
      out[i * M + j] = sum;
    }
}

template <int N, int M>
static inline void tile_bf16(const Matrix& w, const Rows& x, int64_t n, int64_t m, float* out) {
  for (int i = 0; i < N; i++)
    for (int j = 0; j < M; j++) {
      const uint16_t* ws = (const uint16_t*)((const char*)w.weights + (n + i) * w.stride);
      const uint16_t* xs = x.half.data() + (m + j) * x.stride;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < w.k; c++) sum += widened(ws[c]) * widened(xs[c]);
      out[i * M + j] = sum;
    }
}

template <int N, int M, bool FOUR>
static inline void tile_int(const Matrix& w, const Rows& x, int64_t n, int64_t m, float* out) {
  for (int i = 0; i < N; i++)
    for (int j = 0; j < M; j++) {
      const uint8_t* ws = (const uint8_t*)w.weights + (n + i) * w.stride;
      const int8_t* xs = x.small.data() + (m + j) * x.stride;
      float sum = 0;
      for (int64_t g = 0; g < x.groups; g++) {
        int32_t dot = 0;
        const int64_t first = g * x.per_group * 64, end = first + x.per_group * 64;
        for (int64_t c = first; c < (end < x.stride ? end : x.stride); c++) {
          const int64_t in = c % 64, byte = (c / 64) * 32 + in % 32;
          const int value = FOUR ? int(in < 32 ? ws[byte] & 15 : ws[byte] >> 4) - 8 : int(int8_t(ws[c]));
          dot += value * xs[c];
        }
        sum += dot * (FOUR ? w.scales[(n + i) * x.groups + g] : 1.0f) * x.scales[(m + j) * x.groups + g];
      }
      out[i * M + j] = sum * (FOUR ? 1.0f : w.scales[n + i]);
    }
}
#endif

template <int N, int M>
static inline void tile(const Matrix& w, const Rows& x, int64_t n, int64_t m, float* out) {
  switch (w.kind) {
    case F32: return tile_f32<N, M>(w, x, n, m, out);
    case BF16: return tile_bf16<N, M>(w, x, n, m, out);
    case INT8: return tile_int<N, M, false>(w, x, n, m, out);
    default: return tile_int<N, M, true>(w, x, n, m, out);
  }
}

// `give(row, output, value)` for the outputs n0 .. n1 of the activation rows m0 .. m1.
template <int M, class Give>
static inline void columns(const Matrix& w, const Rows& x, int64_t n0, int64_t n1, int64_t m, Give give) {
  constexpr int N = 4;
  float out[N * M];
  int64_t n = n0;
  for (; n + N <= n1; n += N) {
    tile<N, M>(w, x, n, m, out);
    for (int i = 0; i < N; i++)
      for (int j = 0; j < M; j++) give(m + j, n + i, out[i * M + j] + (w.bias ? w.bias[n + i] : 0.0f));
  }
  for (; n < n1; n++) {
    tile<1, M>(w, x, n, m, out);
    for (int j = 0; j < M; j++) give(m + j, n, out[j] + (w.bias ? w.bias[n] : 0.0f));
  }
}

template <class Give>
static void multiply(const Matrix& w, const Rows& x, int64_t n0, int64_t n1, int64_t m0, int64_t m1, Give give) {
  // A panel of weights stays in the first cache while all activation rows pass it.
  const int64_t panel = m1 - m0 <= 1 ? n1 - n0 + 1 : 16;
  for (int64_t first = n0; first < n1; first += panel) {
    const int64_t last = first + panel < n1 ? first + panel : n1;
    int64_t m = m0;
    for (; w.kind < INT8 && m + 4 <= m1; m += 4) columns<4>(w, x, first, last, m, give);  // integers need more registers
    for (; m + 2 <= m1; m += 2) columns<2>(w, x, first, last, m, give);
    for (; m < m1; m++) columns<1>(w, x, first, last, m, give);
  }
}
