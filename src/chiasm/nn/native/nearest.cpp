// Products of a few 8-bit queries with many 8-bit vectors: one walk through
// memory, which is all that a search among 100,000 vectors costs.
//
// Products are whole numbers, so that their order changes nothing: every processor gives the same.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#define WIDE 1
#endif

namespace {

#ifdef WIDE
constexpr int AT_ONCE = 4;  // queries for which a vector is in registers

// `x` is signed; the instruction wants one unsigned side: x + 128, and 128 times the query's sum is taken away.
template <int COUNT>
void products(const int8_t* x, const int8_t* queries, const int32_t* sums, int64_t dim, int32_t* out, int64_t apart) {
  const __m512i flip = _mm512_set1_epi8(char(0x80));
  __m512i sum[COUNT];
  for (int j = 0; j < COUNT; j++) sum[j] = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 64 <= dim; i += 64) {
    const __m512i v = _mm512_xor_si512(_mm512_loadu_si512(x + i), flip);
    for (int j = 0; j < COUNT; j++)
      sum[j] = _mm512_dpbusd_epi32(sum[j], v, _mm512_loadu_si512(queries + j * dim + i));
  }
  if (i < dim) {
    const __mmask64 rest = (uint64_t(1) << (dim - i)) - 1;
    const __m512i v = _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, x + i), flip);
    for (int j = 0; j < COUNT; j++)  // beyond the end the query is 0
      sum[j] = _mm512_dpbusd_epi32(sum[j], v, _mm512_maskz_loadu_epi8(rest, queries + j * dim + i));
  }
  for (int j = 0; j < COUNT; j++) out[j * apart] = _mm512_reduce_add_epi32(sum[j]) - 128 * sums[j];
}
#else
constexpr int AT_ONCE = 1;

template <int COUNT>
void products(const int8_t* x, const int8_t* queries, const int32_t*, int64_t dim, int32_t* out, int64_t apart) {
  for (int j = 0; j < COUNT; j++) {
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < dim; i++) sum += int32_t(x[i]) * int32_t(queries[j * dim + i]);
    out[j * apart] = sum;
  }
}
#endif

}  // namespace

extern "C" {

// `vectors [n, dim]`, `queries [m, dim]` of -127..127 → `out [m, n]`, their products.
void chiasm_products(const int8_t* vectors, int64_t n, int64_t dim, const int8_t* queries, int64_t m, int32_t* out,
                     int32_t threads) {
  int32_t* sums = new int32_t[m];
  for (int64_t j = 0; j < m; j++) {
    sums[j] = 0;
    for (int64_t i = 0; i < dim; i++) sums[j] += queries[j * dim + i];
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1024)
  for (int64_t row = 0; row < n; row++) {
    const int8_t* x = vectors + row * dim;
    int64_t j = 0;
    for (; j + AT_ONCE <= m; j += AT_ONCE) products<AT_ONCE>(x, queries + j * dim, sums + j, dim, out + j * n + row, n);
    for (; j < m; j++) products<1>(x, queries + j * dim, sums + j, dim, out + j * n + row, n);
  }
  delete[] sums;
}
}
