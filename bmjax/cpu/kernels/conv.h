// Convolutions, and their gradients with respect to kernels: packing, strips, sums.

#pragma once

#include "tiles.h"

namespace {

struct Conv {
  Index b, h, w, c, pitch_x;        // of the input, of whose pixels the first c of pitch_x channels are taken
  Index kh, kw, sh, sw, top, left;  // of the kernel
  Index oh, ow, n, pitch_y;         // of the output
  bool unfold = false;              // whether all that a kernel sees is packed, for few channels
  bool by_images = true;

  // A 1x1 convolution sees no neighbours, so its pixels are cut into rows as is best.
  void simplify() {
    by_images = !(kh == 1 && kw == 1 && sh == 1 && sw == 1 && oh == h && ow == w);
    if (!by_images) {
      const Index pixels = b * h * w;
      b = 1, h = oh = pixels, w = ow = 1;
    }
    unfold = by_images && kh * kw > 1 && c < 16;
  }
  Index taps() const { return unfold ? 1 : kh * kw; }
  Index depth() const { return unfold ? kh * kw * c : c; }         // channels per tap
  Index panels() const { return (n + PANEL - 1) / PANEL; }
  Index pitch_p() const { return pitch(depth()); }                  // of packed pixels
  Index row_p() const { return unfold ? ow : (ow - 1) * sw + kw; }  // packed pixels a row
  Index rows() const { return b * oh; }
  Index pixel_step() const { return unfold ? 1 : sw; }
  Index row_step() const { return (unfold ? 1 : sh) * row_p() * pitch_p(); }  // floats from one output row to the next
  Index halo() const { return unfold || !by_images ? 0 : std::max<Index>(0, kh - sh); }
};

struct Strip {
  Index first, end;  // rows of the output, over the batch
};

// Strips of so many rows that their packed pixels stay in the cache, and that threads have equally much to do.
std::vector<Strip> strips_of(const Conv& g, Index floats_a_row, Index threads) {
  const Index most = std::max<Index>(1, CACHE / std::max<Index>(1, floats_a_row));
  Index rows = std::max<Index>(1, most - g.halo());
  if (g.by_images && g.oh <= rows) rows = rows / g.oh * g.oh;  // whole images have no neighbours to pack twice
  Index count = round_up((g.rows() + rows - 1) / rows, threads);
  count = std::min(count, g.rows());
  std::vector<Strip> strips;
  for (Index i = 0; i < count; i++) strips.push_back({g.rows() * i / count, g.rows() * (i + 1) / count});
  return strips;
}

// Where the packed rows of a strip begin: for each of its output rows, the first that the kernel sees.
struct Packed {
  float* data;
  std::vector<Index> row;  // of each output row, in floats
};

// How many of its rows, from row o on, follow each other at that distance: the tiles run over them at once.
Index run_at(const Packed& packed, Index o, Index distance) {
  Index run = 1;
  while (o + run < (Index)packed.row.size() && packed.row[o + run] - packed.row[o] == run * distance) run++;
  return run;
}

Index packed_floats(const Conv& g, Index rows) {
  // At worst each image of the strip brings a halo of its own.
  const Index images = g.by_images ? (rows + g.oh - 1) / g.oh + 1 : 1;
  const Index packed_rows = g.unfold ? rows : rows * g.sh + images * g.kh;
  return packed_rows * g.row_p() * g.pitch_p();
}

// Copies channels [0, c) of a pixel through `change`, which takes (lanes, channel, where those lie, how many of them are
// of the pixel); the rest of its last lanes is 0.
template <typename F>
inline void pack_pixel(const float* x, float* out, Index c, const F& change) {
  Index k = 0;
  for (; k + LANES <= c; k += LANES) store(out + k, change(load(x + k), k, x + k, LANES));
  if (k < c) {
    store(out + k, change(load_first(x + k, c - k), k, x + k, c - k));
    std::memset(out + c, 0, 4 * (round_up(c, LANES) - c));
  }
}

struct Same {
  Lanes operator()(Lanes v, Index, const float*, Index) const { return v; }
  Same from(Index) const { return {}; }
};
// v + shift + slope * y, where y lies in a map `other`, as v does in `base`; the vectors are padded to whole lanes.
struct PlusAffine {
  const float *base, *other, *shift, *slope;
  Lanes operator()(Lanes v, Index k, const float* at, Index n) const {
    return v + load(shift + k) + load(slope + k) * load_first(other + (at - base), n);
  }
};
// relu(factor * x + offset); the vectors are padded to whole lanes.
struct NormRelu {
  const float *factor, *offset;
  Lanes operator()(Lanes v, Index k, const float* = nullptr, Index = 0) const {
    return positive(v * load(factor + k) + load(offset + k));
  }
  NormRelu from(Index channel) const { return {factor + channel, offset + channel}; }  // for the channels from there on
};

template <typename F>
Packed pack(const Conv& g, const Strip& s, const float* x, float* memory, const F& change) {
  Packed packed{memory, {}};
  const Index ld = g.pitch_p(), wide = g.row_p();
  if (!g.by_images) {
    for (Index p = s.first; p < s.end; p++) pack_pixel(x + p * g.pitch_x, memory + (p - s.first) * ld, g.c, change);
    return packed;
  }
  float* out = memory;
  for (Index first = s.first; first < s.end;) {
    const Index image = first / g.oh, end = std::min(s.end, (image + 1) * g.oh);
    const float* pixels = x + image * g.h * g.w * g.pitch_x;
    if (g.unfold) {
      for (Index o = first; o < end; o++) {
        packed.row.push_back(out - memory);
        for (Index column = 0; column < g.ow; column++, out += ld) {
          float* to = out;
          // What a row of the kernel sees lies in one piece.
          const Index z = column * g.sw - g.left, before = std::max<Index>(0, -z);
          const Index seen = std::min(g.kw, g.w - z) - before;
          for (Index i = 0; i < g.kh; i++, to += g.kw * g.c) {
            const Index y = (o - image * g.oh) * g.sh + i - g.top;
            const bool inside = y >= 0 && y < g.h && seen > 0;
            if (!inside || seen < g.kw) std::memset(to, 0, 4 * g.kw * g.c);
            if (inside) std::memcpy(to + before * g.c, pixels + (y * g.w + z + before) * g.pitch_x, 4 * seen * g.c);
          }
        }
      }
      first = end;
      continue;
    }
    const Index r0 = (first - image * g.oh) * g.sh - g.top, count = (end - first - 1) * g.sh + g.kh;
    for (Index o = first; o < end; o++) packed.row.push_back(out - memory + (o - first) * g.sh * wide * ld);
    for (Index r = r0; r < r0 + count; r++) {
      for (Index z = -g.left; z < wide - g.left; z++, out += ld) {
        if (r < 0 || r >= g.h || z < 0 || z >= g.w)
          std::memset(out, 0, 4 * round_up(g.c, LANES));
        else
          pack_pixel(pixels + (r * g.w + z) * g.pitch_x, out, g.c, change);
      }
    }
    first = end;
  }
  return packed;
}

// Memory that is written before it is read: not filled with zeros first, as a vector's is, and aligned to a cache line,
// so that none of a tile's loads crosses two.
class Floats {
 public:
  explicit Floats(Index n) : memory(static_cast<float*>(std::aligned_alloc(64, round_up(4 * n, 64))), std::free) {}
  float* data() const { return memory.get(); }

 private:
  std::unique_ptr<float, void (*)(void*)> memory;
};

// Kernels as tiles read them: [panel][tap][k][PANEL], zeros after the last n. Element (t, k, n) is
// w[t * tap + k * row + n * column]; `turned` takes the taps in reverse order.
Floats panels_of(ffi::ThreadPool& pool, const float* w, Index taps, Index depth, Index n, Index tap, Index row, Index column,
                 bool turned) {
  const Index panels = (n + PANEL - 1) / PANEL;
  Floats packed(panels * taps * depth * PANEL);
  parallel(pool, panels, [&](Index panel) {
    float* out = packed.data() + panel * taps * depth * PANEL;
    const Index first = panel * PANEL, count = std::min<Index>(PANEL, n - first);
    for (Index t = 0; t < taps; t++) {
      const float* from = w + (turned ? taps - 1 - t : t) * tap + first * column;
      for (Index k = 0; k < depth; k++, out += PANEL) {
        for (Index i = 0; i < count; i++) out[i] = from[k * row + i * column];
        for (Index i = count; i < PANEL; i++) out[i] = 0;
      }
    }
  });
  return packed;
}

std::vector<Index> tap_offsets(const Conv& g) {
  std::vector<Index> taps;
  for (Index i = 0; i < g.kh && !g.unfold; i++) {
    for (Index j = 0; j < g.kw; j++) taps.push_back((i * g.row_p() + j) * g.pitch_p());
  }
  if (g.unfold) taps.push_back(0);
  return taps;
}

// f(x, pixels, place): for each run of a strip's pixels, where the packed ones start and where the output's pixel lies.
template <typename F>
inline void runs_of(const Conv& g, const Strip& s, const Packed& packed, const F& f) {
  if (!g.by_images) return f(packed.data, s.end - s.first, s.first);
  for (Index o = s.first; o < s.end; o++) f(packed.data + packed.row[o - s.first], g.ow, o * g.ow);
}

// Padded to whole lanes, the rest with zeros.
std::vector<float> padded(const float* v, Index n) {
  std::vector<float> out(round_up(n, PANEL));
  std::copy(v, v + n, out.begin());
  return out;
}

// Mean and biased variance of channels from those of parts: sums and sums of squares around the part's mean.
struct Moments {
  Index n, parts;
  std::vector<float> sums, squares;
  std::vector<Index> counts;
  Moments(Index n, Index parts) : n(n), parts(parts), sums(n * parts), squares(n * parts), counts(parts) {}

  // Of y [pixels, n], in two passes over what is still in the cache.
  void part(Index i, const float* y, Index pixels, Index pitch) {
    float *__restrict sum = sums.data() + i * n, *__restrict square = squares.data() + i * n;
    float* __restrict mean = scratch(3, n);
    counts[i] = pixels;
    for (Index p = 0; p < pixels; p++)
      for (Index k = 0; k < n; k++) sum[k] += y[p * pitch + k];
    for (Index k = 0; k < n; k++) mean[k] = sum[k] / pixels;
    for (Index p = 0; p < pixels; p++) {
      for (Index k = 0; k < n; k++) {
        const float d = y[p * pitch + k] - mean[k];
        square[k] += d * d;
      }
    }
  }

  // Chan, Golub and LeVeque 1983, doi:10.1080/00031305.1983.10483115.
  void finish(float* mean, float* variance) const {
    for (Index k = 0; k < n; k++) {
      double total = 0, around = 0;
      Index seen = 0;
      for (Index i = 0; i < parts; i++) {
        const double sum = sums[i * n + k];
        if (seen) {
          const double apart = sum / counts[i] - total / seen;
          around += apart * apart * seen * counts[i] / (seen + counts[i]);
        }
        around += squares[i * n + k];
        total += sum;
        seen += counts[i];
      }
      mean[k] = total / seen;
      variance[k] = around / seen;
    }
  }
};

// Sums over pixels by channel, of strips that are added up in their order.
struct ChannelSums {
  Index n, parts;
  std::vector<float> first, second;
  ChannelSums(Index n, Index parts) : n(n), parts(parts), first(n * parts), second(n * parts) {}
  static void add(const std::vector<float>& from, Index n, Index parts, float* out) {
    for (Index k = 0; k < n; k++) {
      double total = 0;
      for (Index i = 0; i < parts; i++) total += from[i * n + k];
      out[k] = total;
    }
  }
  void finish(float* out, float* other) const {
    add(first, n, parts, out);
    add(second, n, parts, other);
  }
};

struct AsItIs {
  void operator()(float*, Index, Index, Index, Index) const {}
};
// factor * y + offset, plus `add` [pixels, n] where given, and its positive part if wanted, while a tile is in the cache.
struct Affine {
  Index n;
  const float *factor, *offset, *add;  // the first two padded to whole panels
  bool relu;
  // Of r pixels from `pixel` on, channels [first, first + count).
  void operator()(float* out, Index pixel, Index first, Index r, Index count) const {
    for (Index i = 0; i < r; i++, out += n) {
      const float* a = add ? add + (pixel + i) * n + first : nullptr;
      for (Index k = 0; k < count; k += LANES) {
        const Index here = std::min<Index>(LANES, count - k);
        Lanes v = load_first(out + k, here) * load(factor + first + k) + load(offset + first + k);
        if (a) v += load_first(a + k, here);
        if (relu) v = positive(v);
        if (here == LANES)
          store(out + k, v);
        else
          std::memcpy(out + k, &v, 4 * here);
      }
    }
  }
};

// y = finish(conv(change(x), w)): writes n channels of pixels that lie pitch_y apart; `moments` of y where given.
template <typename F, typename E = AsItIs>
void convolve(ffi::ThreadPool& pool, const Conv& g, const float* x, const F& change, const Floats& w, float* y,
              std::unique_ptr<Moments>* moments = nullptr, const E& finish = E()) {
  const Index threads = threads_of(pool), panels = g.panels();
  const auto strips = strips_of(g, g.row_step(), threads);
  const auto taps = tap_offsets(g);
  if (moments) *moments = std::make_unique<Moments>(g.n, strips.size());
  // A single strip (one small image) is divided by channels instead.
  const Index shares = (Index)strips.size() < threads && !moments ? std::min(threads, panels) : 1;
  parallel(pool, strips.size() * shares, [&](Index job) {
    const Strip s = strips[job / shares];
    const Index from = panels * (job % shares) / shares, to = panels * (job % shares + 1) / shares;
    const Packed packed = pack(g, s, x, scratch(0, packed_floats(g, s.end - s.first)), change);
    for (Index panel = from; panel < to; panel++) {
      const float* wp = w.data() + panel * g.taps() * g.depth() * PANEL;
      const Index first = panel * PANEL, count = std::min<Index>(PANEL, g.n - first);
      const Index step = g.pixel_step() * g.pitch_p();
      runs_of(g, s, packed, [&](const float* px, Index pixels, Index place) {
        in_tiles(pixels, [&](Index p, Index r) {
          float* out = y + (place + p) * g.pitch_y + first;
          const float* in = px + p * step;
          if (count == PANEL) {
            by_size<Product>(r, in, step, taps.data(), (int)taps.size(), g.depth(), wp, out, g.pitch_y);
          } else {
            float rest[TILE * PANEL];
            by_size<Product>(r, in, step, taps.data(), (int)taps.size(), g.depth(), wp, (float*)rest, (Index)PANEL);
            for (Index i = 0; i < r; i++) std::memcpy(out + i * g.pitch_y, rest + i * PANEL, 4 * count);
          }
          finish(out, place + p, first, r, count);
        });
      });
    }
    if (moments) (*moments)->part(job, y + s.first * g.ow * g.pitch_y, (s.end - s.first) * g.ow, g.pitch_y);
  });
}

// Adds up the parts of a sum [slots][taps][depth][panels * PANEL] into out [taps * depth, n].
void add_parts(ffi::ThreadPool& pool, const std::vector<float>& parts, Index slots, Index rows, Index n, float* out) {
  const Index wide = round_up(n, PANEL), chunks = std::min<Index>(rows, 4 * threads_of(pool));
  parallel(pool, chunks, [&](Index chunk) {
    for (Index r = rows * chunk / chunks; r < rows * (chunk + 1) / chunks; r++) {
      for (Index k = 0; k < n; k++) {
        float total = 0;
        for (Index s = 0; s < slots; s++) total += parts[(s * rows + r) * wide + k];
        out[r * n + k] = total;
      }
    }
  });
}

// The gradient [kh, kw, c, n] of conv(change(x), w) with respect to w, from that of its result, y [.., n].
template <typename F>
void kernel_gradient(ffi::ThreadPool& pool, const Conv& g, const float* x, const F& change, const float* y, float* out) {
  const Index threads = threads_of(pool), wide = round_up(g.n, PANEL), panels = g.panels();
  const Index rows = g.taps() * g.depth();
  // Each slot has sums of its own. Where these are large, threads share one set and divide its channels instead.
  const bool by_channels = rows * wide > 512 * 1024 && g.depth() >= 2 * TILE;
  const Index slots = by_channels ? 1 : threads, shares = by_channels ? threads : 1;
  const auto strips = strips_of(g, g.row_step() + g.ow * wide, slots);
  const auto taps = tap_offsets(g);
  std::vector<float> parts(slots * rows * wide);
  const Index count = strips.size(), step = g.pixel_step() * g.pitch_p();
  parallel(pool, slots * shares, [&](Index job) {
    const Index slot = job / shares, share = job % shares;
    float* sums = parts.data() + slot * rows * wide;
    for (Index i = count * slot / slots; i < count * (slot + 1) / slots; i++) {
      const Strip s = strips[i];
      const Packed packed = pack(g, s, x, scratch(0, packed_floats(g, s.end - s.first)), change);
      const float* dy = y + s.first * g.ow * g.pitch_y;
      Index pitch_d = g.pitch_y;
      if (g.n % PANEL) {  // tiles read whole panels
        float* whole = scratch(1, (s.end - s.first) * g.ow * wide);
        for (Index p = 0; p < (s.end - s.first) * g.ow; p++) {
          std::memcpy(whole + p * wide, dy + p * g.pitch_y, 4 * g.n);
          std::memset(whole + p * wide + g.n, 0, 4 * (wide - g.n));
        }
        dy = whole, pitch_d = wide;
      }
      const Index c0 = g.depth() * share / shares, c1 = g.depth() * (share + 1) / shares;
      for (Index o = 0; o < s.end - s.first;) {
        const Index x_row = g.by_images ? g.row_step() : g.pitch_p();
        const Index run = g.by_images ? run_at(packed, o, x_row) : s.end - s.first;
        const float* px = packed.data + (g.by_images ? packed.row[o] : 0);
        const float* py = dy + o * g.ow * pitch_d;
        for (size_t t = 0; t < taps.size(); t++) {
          for (Index panel = 0; panel < panels; panel++) {
            in_tiles(c1 - c0, [&](Index c, Index r) {
              float* to = sums + (t * g.depth() + c0 + c) * wide + panel * PANEL;
              const float *a = px + taps[t] + c0 + c, *d = py + panel * PANEL;
              if (g.by_images)
                by_size<Outer>(r, a, step, x_row, d, pitch_d, g.ow * pitch_d, run, g.ow, to, wide);
              else
                by_size<Outer>(r, a, x_row, (Index)0, d, pitch_d, (Index)0, (Index)1, run, to, wide);
            });
          }
        }
        o += run;
      }
    }
  });
  add_parts(pool, parts, slots, rows, g.n, out);
}

}  // namespace
