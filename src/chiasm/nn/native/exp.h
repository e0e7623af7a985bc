// The exponential of 16 numbers, and two to the power of them.
#pragma once
#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>

static inline __m512 exp16(__m512 x) {  // relative error below 2e-7 (Cephes' polynomial)
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);  // this way round, what is no number stays none
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// For what is rounded to bfloat16 next: relative error below 3e-6 (least largest error of degree four in -1/2 .. 1/2).
static inline __m512 power16(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
  const __m512 whole = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(9.5828494305e-3f);
  for (const float c : {5.5906424643e-2f, 2.4024098696e-1f, 6.9312419345e-1f, 1.0f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, whole);
}
#endif
