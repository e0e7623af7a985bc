// Which outputs of a large matrix may be among the best of a row, without reading the matrix whole.
//
// A copy of the weights w in eight bits, w' = w - r, and the row x rounded likewise, x' = x - e, tell every output to
//   |w·x - w'·x'| = |r·x + w'·e| <= |r| |x| + |w'| |e|        (Cauchy and Schwarz)
// and both norms on the right are known, |r| and |w'| for each output since the copy was made. An output whose upper
// bound is below the lower bounds of as many others as are asked for cannot be one of the best. The few that are left
// are computed from the matrix itself, as they are without all this. Half of the bytes are read (of float32 a quarter).
#pragma once
#include "matrix.h"

struct Shortlist {
  Matrix w;             // INT8; no weights: there is no list
  const float *off;     // [n]: |r|
  const float *length;  // [n]: |w'|

  // What a row adds to the bounds: |x|, and |e| with what sums in float32 may be away from exact ones.
  struct Row {
    float x, e;
  };

  // Puts a row `x [k]`, as the matrix itself is multiplied with, into `rows`.
  Row set(Rows& rows, int64_t row, const float* x) const {
    rows.set(row, x, INT8);
    const int8_t* small = rows.small.data() + row * rows.stride;
    double square = 0, error = 0;
    for (int64_t i = 0; i < rows.k; i++) {
      const double e = x[i] - double(rows.scales[row * rows.groups + i / rows.per_group]) * small[i];
      square += double(x[i]) * x[i];
      error += e * e;
    }
    const double length = std::sqrt(square);
    return {float(length), float(std::sqrt(error) + length * rows.k * 0x1p-22)};
  }

  float bound(int64_t n, Row row) const { return off[n] * row.x + length[n] * row.e; }
};

// Rounds `w [n, k]` of float32 or bfloat16 into `packed`, a matrix of eight bits in panels, with the norms of a list.
static void shortened(const Matrix& w, uint8_t* packed, float* scales, float* off, float* length, int threads) {
  const int64_t wide = (w.k + 63) / 64 * 64, all = (w.n + PANEL - 1) / PANEL * PANEL;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> row(wide), rounded(wide);
#pragma omp for
    for (int64_t n = 0; n < all; n++) {
      const char* from = (const char*)w.weights + n * w.stride;
      if (n >= w.n)
        std::fill(row.begin(), row.end(), 0.0f);
      else if (w.kind == F32)
        std::memcpy(row.data(), from, w.k * sizeof(float));
      else
        for (int64_t i = 0; i < w.k; i++) row[i] = widened(((const uint16_t*)from)[i]);
      float most = 1e-12f;
#pragma omp simd reduction(max : most)
      for (int64_t i = 0; i < wide; i++) most = std::fabs(row[i]) > most ? std::fabs(row[i]) : most;
      const float scale = most / 127.0f, inverse = 127.0f / most;
      double error = 0, square = 0;
#pragma omp simd reduction(+ : error, square)
      for (int64_t i = 0; i < wide; i++) {
        rounded[i] = std::nearbyintf(row[i] * inverse);
        const double given = double(scale) * rounded[i], missed = row[i] - given;
        error += missed * missed;
        square += given * given;
      }
      uint8_t* to = packed + n / PANEL * PANEL * wide + n % PANEL * 4;
      for (int64_t i = 0; i < wide; i += 4) {
        uint8_t four[4];
        for (int c = 0; c < 4; c++) four[c] = uint8_t(int(rounded[i + c]) + 128);
        std::memcpy(to + i * PANEL, four, 4);
      }
      scales[n] = scale;
      if (n < w.n) off[n] = float(std::sqrt(error)), length[n] = float(std::sqrt(square));
    }
  }
}
