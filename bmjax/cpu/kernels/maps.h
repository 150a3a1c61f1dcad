// What a map's values are looked at for once or a few times: depthwise convolutions, pooling, sums of norms.

#pragma once

#include "conv.h"

namespace {

// out[k] = sum over the N places of x[i][k] * w[i][k] for channels k; N = 0: `count` places.
template <int N>
void weigh(const float* const* x, const float* const* w, int count, Index channels, float* out) {
  if constexpr (N > 0) count = N;
  Index k = 0;
  for (; k + LANES <= channels; k += LANES) {
    Lanes sum = {};
    for (int i = 0; i < count; i++) sum += load(x[i] + k) * load(w[i] + k);
    store(out + k, sum);
  }
  for (; k < channels; k++) {
    float sum = 0;
    for (int i = 0; i < count; i++) sum += x[i][k] * w[i][k];
    out[k] = sum;
  }
}

// The row (or column) of the input that place i of a kernel sees from row o of the output, or, `back`, the row of the
// output that saw row o of the input through place i; -1 where there is none.
inline Index seen(Index o, Index i, Index stride, Index before, Index size, bool back) {
  const Index r = back ? o + before - i : o * stride + i - before;
  if (!back) return r >= 0 && r < size ? r : -1;
  return r >= 0 && r % stride == 0 && r / stride < size ? r / stride : -1;
}

// A convolution of each channel by itself, or its gradient with respect to the input: x [b, h, w, c] -> [b, oh, ow, c].
void depthwise(ffi::ThreadPool& pool, const Conv& g, const float* x, const float* w, float* y, bool back) {
  const Index rows = g.rows(), chunks = std::min<Index>(rows, 8 * threads_of(pool));
  parallel(pool, chunks, [&](Index chunk) {
    std::vector<const float*> xs(g.kh * g.kw), ws(g.kh * g.kw);
    for (Index o = rows * chunk / chunks; o < rows * (chunk + 1) / chunks; o++) {
      const float* image = x + o / g.oh * g.h * g.w * g.c;
      for (Index column = 0; column < g.ow; column++) {
        int count = 0;
        for (Index i = 0; i < g.kh; i++) {
          const Index r = seen(o % g.oh, i, g.sh, g.top, g.h, back);
          if (r < 0) continue;
          for (Index j = 0; j < g.kw; j++) {
            const Index z = seen(column, j, g.sw, g.left, g.w, back);
            if (z < 0) continue;
            xs[count] = image + (r * g.w + z) * g.c;
            ws[count++] = w + (i * g.kw + j) * g.c;
          }
        }
        float* out = y + (o * g.ow + column) * g.c;
        if (count == 9)
          weigh<9>(xs.data(), ws.data(), count, g.c, out);
        else if (count == 25)
          weigh<25>(xs.data(), ws.data(), count, g.c, out);
        else
          weigh<0>(xs.data(), ws.data(), count, g.c, out);
      }
    }
  });
}

// A convolution of each channel of relu(norm(x)) by itself: some rows are packed, normalised once, and then weighed.
void normed_depthwise(ffi::ThreadPool& pool, const Conv& g, const float* x, const NormRelu& norm, const float* w, float* y) {
  const Index chunk = std::min<Index>(round_up(g.c, LANES), 16 * LANES);
  const auto strips = strips_of(g, g.sh * g.row_p() * pitch(chunk), threads_of(pool));
  parallel(pool, strips.size(), [&](Index i) {
    const Strip s = strips[i];
    for (Index first = 0; first < g.c; first += chunk) {
      Conv part = g;
      part.c = std::min(chunk, g.c - first);
      const auto taps = tap_offsets(part);
      const Packed packed = pack(part, s, x + first, scratch(0, packed_floats(part, s.end - s.first)), norm.from(first));
      std::vector<const float*> xs(taps.size()), ws(taps.size());
      for (size_t t = 0; t < taps.size(); t++) ws[t] = w + t * g.c + first;
      for (Index o = s.first; o < s.end; o++) {
        for (Index column = 0; column < g.ow; column++) {
          const float* px = packed.data + packed.row[o - s.first] + column * g.sw * part.pitch_p();
          for (size_t t = 0; t < taps.size(); t++) xs[t] = px + taps[t];
          float* out = y + (o * g.ow + column) * g.c + first;
          if (taps.size() == 9)
            weigh<9>(xs.data(), ws.data(), 9, part.c, out);
          else
            weigh<0>(xs.data(), ws.data(), taps.size(), part.c, out);
        }
      }
    }
  });
}

// sums[t] += x[taps[t] + column * step] * y[column * pitch] over columns, for N places and LANES channels.
template <int N>
void weigh_back(const float* x, const Index* taps, Index step, const float* y, Index pitch, Index columns, float* sums,
                Index wide) {
  Lanes total[N];
  for (int t = 0; t < N; t++) total[t] = load(sums + t * wide);
  for (Index j = 0; j < columns; j++, x += step, y += pitch) {
    const Lanes d = load(y);
#pragma GCC unroll 32
    for (int t = 0; t < N; t++) total[t] += load(x + taps[t]) * d;
  }
  for (int t = 0; t < N; t++) store(sums + t * wide, total[t]);
}

// The gradient [kh, kw, 1, c] of a depthwise convolution of change(x) with respect to its kernel.
template <typename F>
void depthwise_kernel_gradient(ffi::ThreadPool& pool, const Conv& g, const float* x, const F& change, const float* y,
                               float* out) {
  const Index threads = threads_of(pool), taps = g.kh * g.kw, wide = round_up(g.c, PANEL);
  const Index chunk = std::min<Index>(round_up(g.c, LANES), 16 * LANES);  // channels at once: so many that their rows stay in the cache
  const auto strips = strips_of(g, g.sh * g.row_p() * pitch(chunk), threads);
  const Index count = strips.size();
  std::vector<float> parts(threads * taps * wide);
  parallel(pool, threads, [&](Index slot) {
    float* own = parts.data() + slot * taps * wide;
    for (Index i = count * slot / threads; i < count * (slot + 1) / threads; i++) {
      const Strip s = strips[i];
      for (Index first = 0; first < g.c; first += chunk) {
        Conv part = g;
        part.c = std::min(chunk, g.c - first);
        const auto offsets = tap_offsets(part);
        const Packed packed = pack(part, s, x + first, scratch(0, packed_floats(part, s.end - s.first)), change.from(first));
        const Index ld = part.pitch_p(), whole = part.c / LANES * LANES;
        float* rest = scratch(1, g.ow * LANES);
        for (Index o = s.first; o < s.end; o++) {
          const float *px = packed.data + packed.row[o - s.first], *py = y + o * g.ow * g.c + first;
          for (Index k = 0; k < part.c; k += LANES) {
            const float* d = py + k;
            Index pitch_d = g.c;
            if (k == whole) {  // the last channels, filled up to whole lanes
              for (Index p = 0; p < g.ow; p++) {
                std::memset(rest + p * LANES, 0, 4 * LANES);
                std::memcpy(rest + p * LANES, d + p * g.c, 4 * (part.c - whole));
              }
              d = rest, pitch_d = LANES;
            }
            float* to = own + first + k;
            if (taps == 9)
              weigh_back<9>(px + k, offsets.data(), g.sw * ld, d, pitch_d, g.ow, to, wide);
            else if (taps == 25)
              weigh_back<25>(px + k, offsets.data(), g.sw * ld, d, pitch_d, g.ow, to, wide);
            else
              for (Index t = 0; t < taps; t++)
                weigh_back<1>(px + k, offsets.data() + t, g.sw * ld, d, pitch_d, g.ow, to + t * wide, wide);
          }
        }
      }
    }
  });
  add_parts(pool, parts, threads, taps, g.c, out);
}

// The gradient of a max-pool with respect to its input [b, h, w, c], from that of its result and from the place in the
// window, counted row by row, that each maximum came from.
void max_pool_backward_of(ffi::ThreadPool& pool, const float* dy, const int8_t* place, Index b, Index oh, Index ow, Index c,
                          Index h, Index w, Index size, Index stride, Index top, Index left, float* dx) {
  const Index rows = b * h, chunks = std::min<Index>(rows, 8 * threads_of(pool));
  parallel(pool, chunks, [&](Index chunk) {
    for (Index o = rows * chunk / chunks; o < rows * (chunk + 1) / chunks; o++) {
      for (Index column = 0; column < w; column++) {
        float* __restrict out = dx + (o * w + column) * c;
        std::fill(out, out + c, 0.0f);
        for (Index i = 0; i < size; i++) {
          const Index r = seen(o % h, i, stride, top, oh, true);
          if (r < 0) continue;
          for (Index j = 0; j < size; j++) {
            const Index z = seen(column, j, stride, left, ow, true);
            if (z < 0) continue;
            const Index from = ((o / h * oh + r) * ow + z) * c;
            const float* __restrict d = dy + from;
            const int8_t *__restrict of = place + from, here = (int8_t)(i * size + j);
            for (Index k = 0; k < c; k++) out[k] += of[k] == here ? d[k] : 0.0f;
          }
        }
      }
    }
  });
}

// In how many parts so many pixels are looked at, each small enough for the cache; whatever the number of threads.
Index parts_of(Index pixels, Index c) { return std::min(pixels, round_up(1 + pixels * c / (CACHE / 2), 8)); }

void moments_of(ffi::ThreadPool& pool, const float* x, Index pixels, Index c, float* mean, float* variance) {
  const Index parts = parts_of(pixels, c);
  Moments moments(c, parts);
  parallel(pool, parts, [&](Index i) {
    const Index from = pixels * i / parts;
    moments.part(i, x + from * c, pixels * (i + 1) / parts - from, c);
  });
  moments.finish(mean, variance);
}

// Sums over pixels of d and of d * x, by channel, where d is `of`(dy, x, channel).
template <typename F>
void channel_sums_of(ffi::ThreadPool& pool, const float* dy, const float* x, Index pixels, Index c, const F& of, float* sum,
                     float* sum_x) {
  const Index parts = parts_of(pixels, 2 * c);
  ChannelSums sums(c, parts);
  parallel(pool, parts, [&](Index i) {
    float *__restrict first = sums.first.data() + i * c, *__restrict second = sums.second.data() + i * c;
    for (Index p = pixels * i / parts; p < pixels * (i + 1) / parts; p++) {
      const float *__restrict from = dy + p * c, *__restrict v = x + p * c;
      for (Index k = 0; k < c; k++) {
        const float d = of(from[k], v[k], k);
        first[k] += d, second[k] += d * v[k];
      }
    }
  });
  sums.finish(sum, sum_x);
}

}  // namespace
