// A dense layer: its norms, and its way back, gradients of convolution, ReLU and norm at once.

#pragma once

#include <cmath>

#include "conv.h"

namespace {

// A batch-norm of c channels as factor * x + offset, padded to whole panels.
struct Norm {
  Index c;
  const float *scale, *mean;
  std::vector<float> inverse, factor, offset;

  Norm(Index c, const float* scale, const float* bias, const float* mean, const float* variance, double epsilon)
      : c(c), scale(scale), mean(mean), inverse(round_up(c, PANEL)), factor(inverse.size()), offset(inverse.size()) {
    for (Index k = 0; k < c; k++) {
      inverse[k] = 1 / std::sqrt(variance[k] + (float)epsilon);
      factor[k] = scale[k] * inverse[k];
      offset[k] = (bias ? bias[k] : 0) - mean[k] * factor[k];
    }
  }
  NormRelu relu() const { return {factor.data(), offset.data()}; }

  // Gradients of scale, mean and variance, the last two added where wanted; that of the bias is `total`. `total` and
  // `total_x`: sums of the gradient of the norm's result and of that times its input.
  void back(const float* total, const float* total_x, float* dscale, float* dmean, float* dvariance, bool add) const {
    for (Index k = 0; k < c; k++) {
      const float of_factor = total_x[k] - mean[k] * total[k], of_mean = -factor[k] * total[k];
      const float of_variance = -0.5f * of_factor * factor[k] * inverse[k] * inverse[k];
      dscale[k] = of_factor * inverse[k];
      dmean[k] = (add ? dmean[k] : 0) + of_mean;
      dvariance[k] = (add ? dvariance[k] : 0) + of_variance;
    }
  }
};

// What comes to y through its statistics over `count` values, shift + slope * y, padded to whole panels; 0 of none.
struct ThroughStatistics {
  std::vector<float> shift, slope;
  ThroughStatistics(Index n, const float* mean, const float* dmean, const float* dvariance, Index count)
      : shift(round_up(n, PANEL)), slope(shift.size()) {
    for (Index k = 0; k < n && count; k++) {
      slope[k] = 2 * dvariance[k] / count;
      shift[k] = dmean[k] / count - slope[k] * mean[k];
    }
  }
};

// Of `count` channels, PANEL at most: d = gradient where the packed value is positive, else 0; adds up d and d * x, and
// hands d on to `use`.
template <typename F>
inline void through_relu(const float* gradient, const float* packed, Index pitch_p, const float* x, Index pitch_x,
                         Index pixels, Index count, float* sum, float* sum_x, const F& use) {
  if (count == PANEL) {
    Lanes s0 = {}, s1 = {}, x0 = {}, x1 = {};
    for (Index p = 0; p < pixels; p++, gradient += PANEL, packed += pitch_p, x += pitch_x) {
      const Lanes d0 = where_positive(load(packed), load(gradient));
      const Lanes d1 = where_positive(load(packed + LANES), load(gradient + LANES));
      s0 += d0, s1 += d1;
      x0 += d0 * load(x), x1 += d1 * load(x + LANES);
      use.whole(p, d0, d1);
    }
    store(sum, s0), store(sum + LANES, s1), store(sum_x, x0), store(sum_x + LANES, x1);
    return;
  }
  std::fill(sum, sum + count, 0.0f), std::fill(sum_x, sum_x + count, 0.0f);
  for (Index p = 0; p < pixels; p++, gradient += PANEL, packed += pitch_p, x += pitch_x) {
    for (Index k = 0; k < count; k++) {
      const float d = packed[k] > 0 ? gradient[k] : 0;
      sum[k] += d, sum_x[k] += d * x[k];
      use.one(p, k, d);
    }
  }
}

struct Write {
  float* out;
  Index pitch;
  void whole(Index p, Lanes d0, Lanes d1) const { store(out + p * pitch, d0), store(out + p * pitch + LANES, d1); }
  void one(Index p, Index k, float d) const { out[p * pitch + k] = d; }
};

struct AddScaled {
  float* out;
  Index pitch;
  const float* factor;
  void whole(Index p, Lanes d0, Lanes d1) const {
    float* to = out + p * pitch;
    store(to, load(to) + load(factor) * d0), store(to + LANES, load(to + LANES) + load(factor + LANES) * d1);
  }
  void one(Index p, Index k, float d) const { out[p * pitch + k] += factor[k] * d; }
};

// Gradients of conv(relu(factor * x + offset), w) to the norm's result and to w, from `dy` of its result. `g` is the
// convolution of change(dy) with the turned kernel: its input has the layer's new channels, its output those of x.
template <typename F>
void spatial_backward(ffi::ThreadPool& pool, const Conv& g, const float* x, const NormRelu& norm, const float* dy,
                      const F& change, const Floats& turned, float* dz, float* dw, float* sum, float* sum_x) {
  const Index threads = threads_of(pool), m = g.n, pitch_n = pitch(m), pitch_d = g.pitch_p();
  const Index taps = g.taps(), wide = round_up(g.c, PANEL), rows = taps * m, panels = g.panels();
  const auto strips = strips_of(g, g.row_step() + g.ow * (pitch_n + PANEL), threads);
  const auto offsets = tap_offsets(g);
  const Index count = strips.size(), d_row = g.row_step();
  std::vector<float> parts(threads * rows * wide);
  ChannelSums sums(m, count);
  parallel(pool, threads, [&](Index slot) {
    float* own = parts.data() + slot * rows * wide;
    for (Index i = count * slot / threads; i < count * (slot + 1) / threads; i++) {
      const Strip s = strips[i];
      const Index lines = s.end - s.first, pixels = lines * g.ow;
      const Packed packed = pack(g, s, dy, scratch(0, packed_floats(g, lines) + PANEL), change);
      float *xn = scratch(1, pixels * pitch_n), *back = scratch(2, pixels * PANEL);
      const float* xs = x + s.first * g.ow * m;
      for (Index p = 0; p < pixels; p++) pack_pixel(xs + p * m, xn + p * pitch_n, m, norm);
      for (Index o = 0; o < lines;) {
        const Index run = run_at(packed, o, d_row);
        for (Index t = 0; t < taps; t++) {
          // What the kernel's tap t sees of x, the turned kernel's tap taps - 1 - t sees of dy.
          const float* d = packed.data + packed.row[o] + offsets[taps - 1 - t];
          for (Index panel = 0; panel < wide / PANEL; panel++) {
            in_tiles(m, [&](Index k, Index r) {
              by_size<Outer>(r, (const float*)xn + o * g.ow * pitch_n + k, pitch_n, g.ow * pitch_n, d + panel * PANEL,
                             pitch_d, d_row, run, g.ow, own + (t * m + k) * wide + panel * PANEL, wide);
            });
          }
        }
        o += run;
      }
      for (Index panel = 0; panel < panels; panel++) {
        const float* wp = turned.data() + panel * taps * g.depth() * PANEL;
        runs_of(g, s, packed, [&](const float* px, Index columns, Index place) {
          float* out = back + (place - s.first * g.ow) * PANEL;
          in_tiles(columns, [&](Index p, Index r) {
            by_size<Product>(r, px + p * pitch_d, pitch_d, offsets.data(), (int)taps, g.depth(), wp, out + p * PANEL,
                             (Index)PANEL);
          });
        });
        const Index k = panel * PANEL, real = std::min<Index>(PANEL, m - k);
        through_relu(back, xn + k, pitch_n, xs + k, m, pixels, real, sums.first.data() + i * m + k,
                     sums.second.data() + i * m + k, Write{dz + s.first * g.ow * m + k, m});
      }
    }
  });
  add_parts(pool, parts, threads, rows, g.c, dw);
  sums.finish(sum, sum_x);
}

// Gradients of relu(factor * x + offset) @ w, of the first c channels of x and w [c, m], from that of its result,
// dy = scale * dz + shift + slope * y. Adds factor * (that to the norm's result) to `into`, which lies as x does.
void pointwise_backward(ffi::ThreadPool& pool, Index pixels, Index c, Index pitch_x, Index m, const float* x,
                        const NormRelu& norm, const float* dz, const float* y, const float* scale, const float* shift,
                        const float* slope, const Floats& transposed, float* into, float* dw, float* sum,
                        float* sum_x) {
  const Index threads = threads_of(pool), wide = round_up(m, PANEL), panels = (c + PANEL - 1) / PANEL;
  const Index pitch_n = pitch(c), pitch_d = pitch(wide), tap = 0;
  Conv g{1, pixels, 1, c, pitch_x, 1, 1, 1, 1, 0, 0, pixels, 1, m, m};
  g.simplify();
  const auto strips = strips_of(g, pitch_n + pitch_d + PANEL, threads);
  const Index count = strips.size();
  std::vector<float> parts(threads * c * wide);
  ChannelSums sums(c, count);
  parallel(pool, threads, [&](Index slot) {
    float* own = parts.data() + slot * c * wide;
    for (Index i = count * slot / threads; i < count * (slot + 1) / threads; i++) {
      const Index first = strips[i].first, n = strips[i].end - first;
      float *xn = scratch(0, n * pitch_n), *dy = scratch(1, n * pitch_d + PANEL), *back = scratch(2, n * PANEL);
      const float* xs = x + first * pitch_x;
      for (Index p = 0; p < n; p++) {
        pack_pixel(xs + p * pitch_x, xn + p * pitch_n, c, norm);
        const float* at = y + (first + p) * m;
        pack_pixel(dz + (first + p) * m, dy + p * pitch_d, m, [&](Lanes d, Index k, const float*, Index n) {
          return load(scale + k) * d + load(shift + k) + load(slope + k) * load_first(at + k, n);
        });
      }
      for (Index panel = 0; panel < wide / PANEL; panel++) {
        in_tiles(c, [&](Index k, Index r) {
          by_size<Outer>(r, (const float*)xn + k, pitch_n, (Index)0, (const float*)dy + panel * PANEL, pitch_d, (Index)0,
                         (Index)1, n, own + k * wide + panel * PANEL, wide);
        });
      }
      for (Index panel = 0; panel < panels; panel++) {
        const float* wp = transposed.data() + panel * m * PANEL;
        in_tiles(n, [&](Index p, Index r) {
          by_size<Product>(r, (const float*)dy + p * pitch_d, pitch_d, &tap, 1, m, wp, back + p * PANEL, (Index)PANEL);
        });
        const Index k = panel * PANEL, real = std::min<Index>(PANEL, c - k);
        through_relu(back, xn + k, pitch_n, xs + k, pitch_x, n, real, sums.first.data() + i * c + k,
                     sums.second.data() + i * c + k, AddScaled{into + first * pitch_x + k, pitch_x, norm.factor + k});
      }
    }
  });
  add_parts(pool, parts, threads, c, m, dw);
  sums.finish(sum, sum_x);
}

}  // namespace
