// Convolutions and dense layers on CPUs, as custom calls of XLA: float32, NHWC, kernels HWIO.
//
// XLA's CPU backend transposes whole feature maps for the gradient of a convolution with respect to its kernel, and
// reads a map again for each norm, ReLU and sum around one. Here a few rows of pixels are packed (padded, normalised,
// ReLU applied) into memory that stays in the second-level cache, and all that needs them is computed there, on
// register tiles of TILE pixels by PANEL channels (Goto and van de Geijn 2008, doi:10.1145/1356052.1356053; the direct
// convolution of Zhang et al. 2018, arXiv:1809.10170). What each function computes is written down in bmjax/native.py,
// beside the same in jax.numpy, which the tests hold it to.
//
// Work is divided by the sizes alone and partial sums are added in a fixed order: the same input gives the same bits.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Index = int64_t;
using Map = ffi::Buffer<ffi::F32, 4>;
using Vector = ffi::Buffer<ffi::F32, 1>;
using MapResult = ffi::Result<Map>;
using VectorResult = ffi::Result<Vector>;

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 14;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE = 6;
#else
constexpr int LANES = 4, TILE = 12;
#endif
constexpr int PANEL = 2 * LANES;
constexpr Index CACHE = 160 * 1024;  // floats of packed pixels at once: a third of a usual second-level cache

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Bits __attribute__((vector_size(4 * LANES), aligned(4)));

inline Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
inline void store(float* p, Lanes v) { *reinterpret_cast<Lanes*>(p) = v; }
inline Lanes positive(Lanes v) {
  // A comparison is all ones where it holds. NaN is kept, as jax.numpy.maximum keeps it.
  return (Lanes)((Bits)v & ~(Bits)(v <= 0));
}
inline Lanes where_positive(Lanes by, Lanes v) { return (Lanes)((Bits)v & (Bits)(by > 0)); }
inline Index round_up(Index n, Index to) { return (n + to - 1) / to * to; }
// Distance of packed pixels: an odd number of cache lines, so that those of a tile lie in different sets.
inline Index pitch(Index channels) { return (round_up(channels, 16) / 16 | 1) * 16; }

// ---------------------------------------------------------------------------------------------------- threads

struct Jobs {
  std::atomic<Index> next{0};
  Index count, done = 0;
  std::mutex mutex;
  std::condition_variable finished;
};

// f(0), ..., f(count - 1) on the pool's threads and this one. This one waits only for what has begun elsewhere, so a
// pool whose threads all wait here can't come to a stop.
template <typename F>
void parallel(ffi::ThreadPool& pool, Index count, const F& f) {
  if (count <= 1 || pool.num_threads() <= 1) {
    for (Index i = 0; i < count; i++) f(i);
    return;
  }
  auto jobs = std::make_shared<Jobs>();
  jobs->count = count;
  auto work = [jobs, &f] {
    Index mine = 0;
    for (Index i; (i = jobs->next++) < jobs->count; mine++) f(i);
    if (mine == 0) return;
    std::lock_guard<std::mutex> lock(jobs->mutex);
    if ((jobs->done += mine) == jobs->count) jobs->finished.notify_one();
  };
  for (Index i = 1; i < std::min<Index>(count, pool.num_threads()); i++) {
    auto again = work;
    pool.Schedule(std::move(again));
  }
  work();
  std::unique_lock<std::mutex> lock(jobs->mutex);
  jobs->finished.wait(lock, [&] { return jobs->done == jobs->count; });
}

// Memory of a thread that keeps its size, aligned to a cache line; `slot` tells the pieces of one function apart.
float* scratch(int slot, Index floats) {
  struct Piece {
    std::unique_ptr<float, void (*)(void*)> memory{nullptr, std::free};
    Index floats = 0;
  };
  thread_local Piece pieces[4];
  Piece& piece = pieces[slot];
  if (piece.floats < floats) {
    piece.memory.reset(static_cast<float*>(std::aligned_alloc(64, round_up(4 * floats, 64))));
    piece.floats = floats;
  }
  return piece.memory.get();
}

// ------------------------------------------------------------------------------------------------------ tiles

// out[r][n] = sum over taps t and channels k of x[taps[t] + r * pixel + k] * w[t][k][n], for R pixels and PANEL n.
template <int R>
void product_tile(const float* x, Index pixel, const Index* taps, int count, Index channels, const float* w, float* out,
                  Index out_pixel) {
  Lanes sums[R][2] = {};
  for (int t = 0; t < count; t++) {
    const float* p = x + taps[t];
    for (Index k = 0; k < channels; k++, p++, w += PANEL) {
      const Lanes w0 = load(w), w1 = load(w + LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        // Written so that every third pixel has a pointer, and the two after it are offsets from that.
        const float value = (p + r / 3 * 3 * pixel)[r % 3 * pixel];
        sums[r][0] += value * w0;
        sums[r][1] += value * w1;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    store(out + r * out_pixel, sums[r][0]);
    store(out + r * out_pixel + LANES, sums[r][1]);
  }
}

// out[r][n] += sum over rows and columns of x[..][r] * y[..][n], for R channels and PANEL n.
template <int R>
void outer_tile(const float* x, Index x_pixel, Index x_row, const float* y, Index y_pixel, Index y_row, Index rows,
                Index columns, float* out, Index out_channel) {
  Lanes sums[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    sums[r][0] = load(out + r * out_channel);
    sums[r][1] = load(out + r * out_channel + LANES);
  }
  for (Index i = 0; i < rows; i++) {
    const float *p = x + i * x_row, *q = y + i * y_row;
    for (Index j = 0; j < columns; j++, p += x_pixel, q += y_pixel) {
      const Lanes y0 = load(q), y1 = load(q + LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        sums[r][0] += p[r] * y0;
        sums[r][1] += p[r] * y1;
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    store(out + r * out_channel, sums[r][0]);
    store(out + r * out_channel + LANES, sums[r][1]);
  }
}

template <template <int> class F, int R = TILE, typename... A>
inline void by_size(Index r, A... a) {
  if (r == R) return F<R>::run(a...);
  if constexpr (R > 1) by_size<F, R - 1>(r, a...);
}
template <int R>
struct Product {
  template <typename... A>
  static void run(A... a) { product_tile<R>(a...); }
};
template <int R>
struct Outer {
  template <typename... A>
  static void run(A... a) { outer_tile<R>(a...); }
};

// f(first, size) for n things in as few groups of at most TILE as can be, of nearly equal size.
template <typename F>
inline void in_tiles(Index n, const F& f) {
  const Index groups = (n + TILE - 1) / TILE;
  for (Index g = 0; g < groups; g++) f(n * g / groups, n * (g + 1) / groups - n * g / groups);
}

// -------------------------------------------------------------------------------------------------- geometry

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
};

struct Strip {
  Index first, end;  // rows of the output, over the batch
};

// Strips of so many rows that their packed pixels stay in the cache, and that threads have equally much to do.
std::vector<Strip> strips_of(const Conv& g, Index floats_a_row, Index threads, Index halo) {
  const Index most = std::max<Index>(1, CACHE / std::max<Index>(1, floats_a_row));
  Index rows = std::max<Index>(1, most - halo);
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

Index packed_floats(const Conv& g, Index rows) {
  // At worst each image of the strip brings a halo of its own.
  const Index images = g.by_images ? (rows + g.oh - 1) / g.oh + 1 : 1;
  const Index packed_rows = g.unfold ? rows : rows * g.sh + images * g.kh;
  return packed_rows * g.row_p() * g.pitch_p();
}

// Copies channels [0, c) of a pixel through `change`, which takes (lanes, channel); the rest of its last lanes is 0.
template <typename F>
inline void pack_pixel(const float* x, float* out, Index c, const F& change) {
  Index k = 0;
  for (; k + LANES <= c; k += LANES) store(out + k, change(load(x + k), k));
  if (k < c) {
    float rest[LANES] = {};
    std::memcpy(rest, x + k, 4 * (c - k));
    store(out + k, change(load(rest), k));
    std::memset(out + c, 0, 4 * (round_up(c, LANES) - c));
  }
}

struct Same {
  Lanes operator()(Lanes v, Index) const { return v; }
};
// relu(factor * x + offset); the vectors are padded to whole lanes.
struct NormRelu {
  const float *factor, *offset;
  Lanes operator()(Lanes v, Index k) const { return positive(v * load(factor + k) + load(offset + k)); }
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

// Kernels as tiles read them: [panel][tap][k][PANEL], zeros after the last n. Element (t, k, n) is
// w[t * tap + k * row + n * column]; `turned` takes the taps in reverse order.
std::vector<float> panels_of(ffi::ThreadPool& pool, const float* w, Index taps, Index depth, Index n, Index tap, Index row,
                             Index column, bool turned) {
  const Index panels = (n + PANEL - 1) / PANEL;
  std::vector<float> packed(panels * taps * depth * PANEL);
  parallel(pool, panels, [&](Index panel) {
    float* out = packed.data() + panel * taps * depth * PANEL;
    const Index first = panel * PANEL, count = std::min<Index>(PANEL, n - first);
    for (Index t = 0; t < taps; t++) {
      const float* from = w + (turned ? taps - 1 - t : t) * tap + first * column;
      for (Index k = 0; k < depth; k++, out += PANEL) {
        for (Index i = 0; i < count; i++) out[i] = from[k * row + i * column];
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

// y = conv(change(x), w): writes n channels of pixels that lie pitch_y apart; `moments` of y where given.
template <typename F>
void convolve(ffi::ThreadPool& pool, const Conv& g, const float* x, const F& change, const std::vector<float>& w, float* y,
              std::unique_ptr<Moments>* moments = nullptr) {
  const Index threads = std::max<Index>(1, pool.num_threads()), panels = g.panels();
  const Index halo = g.unfold || !g.by_images ? 0 : std::max<Index>(0, g.kh - g.sh);
  const auto strips = strips_of(g, (g.unfold ? 1 : g.sh) * g.row_p() * g.pitch_p(), threads, halo);
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
        });
      });
    }
    if (moments) (*moments)->part(job, y + s.first * g.ow * g.pitch_y, (s.end - s.first) * g.ow, g.pitch_y);
  });
}

// Adds up the parts of a sum [slots][taps][depth][panels * PANEL] into out [taps * depth, n].
void add_parts(ffi::ThreadPool& pool, const std::vector<float>& parts, Index slots, Index rows, Index n, float* out) {
  const Index wide = round_up(n, PANEL), chunks = std::min<Index>(rows, 4 * std::max<Index>(1, pool.num_threads()));
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

// The gradient [kh, kw, c, n] of conv(x, w) with respect to w, from that of its result, y [.., n].
void kernel_gradient(ffi::ThreadPool& pool, const Conv& g, const float* x, const float* y, float* out) {
  const Index threads = std::max<Index>(1, pool.num_threads()), wide = round_up(g.n, PANEL), panels = g.panels();
  const Index rows = g.taps() * g.depth();
  // Each slot has sums of its own. Where these are large, threads share one set and divide its channels instead.
  const bool by_channels = rows * wide > 512 * 1024 && g.depth() >= 2 * TILE;
  const Index slots = by_channels ? 1 : threads, shares = by_channels ? threads : 1;
  const Index halo = g.unfold || !g.by_images ? 0 : std::max<Index>(0, g.kh - g.sh);
  const auto strips = strips_of(g, g.row_p() * g.pitch_p() * (g.unfold ? 1 : g.sh) + g.ow * wide, slots, halo);
  const auto taps = tap_offsets(g);
  std::vector<float> parts(slots * rows * wide);
  const Index count = strips.size(), step = g.pixel_step() * g.pitch_p();
  parallel(pool, slots * shares, [&](Index job) {
    const Index slot = job / shares, share = job % shares;
    float* sums = parts.data() + slot * rows * wide;
    for (Index i = count * slot / slots; i < count * (slot + 1) / slots; i++) {
      const Strip s = strips[i];
      const Packed packed = pack(g, s, x, scratch(0, packed_floats(g, s.end - s.first)), Same());
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
      // Rows that follow each other at one distance, where all neighbours are packed once, are one run of the tile.
      for (Index o = 0; o < s.end - s.first;) {
        Index run = g.by_images ? 1 : s.end - s.first;
        const float* px = packed.data + (g.by_images ? packed.row[o] : 0);
        const Index x_row = g.by_images ? (g.unfold ? 1 : g.sh) * g.row_p() * g.pitch_p() : g.pitch_p();
        if (g.by_images) {
          while (o + run < s.end - s.first && packed.row[o + run] - packed.row[o] == run * x_row) run++;
        }
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

// ------------------------------------------------------------------------------------------- dense layers, back

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
// convolution of dy with the turned kernel: its input has the layer's new channels, its output those of x.
void spatial_backward(ffi::ThreadPool& pool, const Conv& g, const float* x, const NormRelu& norm, const float* dy,
                      const std::vector<float>& turned, float* dz, float* dw, float* sum, float* sum_x) {
  const Index threads = std::max<Index>(1, pool.num_threads()), m = g.n, pitch_n = pitch(m), pitch_d = g.pitch_p();
  const Index taps = g.taps(), wide = round_up(g.c, PANEL), rows = taps * m, panels = g.panels();
  const auto strips = strips_of(g, g.row_p() * pitch_d + g.ow * (pitch_n + PANEL), threads, g.kh - 1);
  const auto offsets = tap_offsets(g);
  const Index count = strips.size(), d_row = g.row_p() * pitch_d;
  std::vector<float> parts(threads * rows * wide);
  ChannelSums sums(m, count);
  parallel(pool, threads, [&](Index slot) {
    float* own = parts.data() + slot * rows * wide;
    for (Index i = count * slot / threads; i < count * (slot + 1) / threads; i++) {
      const Strip s = strips[i];
      const Index lines = s.end - s.first, pixels = lines * g.ow;
      const Packed packed = pack(g, s, dy, scratch(0, packed_floats(g, lines) + PANEL), Same());
      float *xn = scratch(1, pixels * pitch_n), *back = scratch(2, pixels * PANEL);
      const float* xs = x + s.first * g.ow * m;
      for (Index p = 0; p < pixels; p++) pack_pixel(xs + p * m, xn + p * pitch_n, m, norm);
      for (Index o = 0; o < lines;) {
        Index run = 1;
        while (o + run < lines && packed.row[o + run] - packed.row[o] == run * d_row) run++;
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
                        const float* slope, const std::vector<float>& transposed, float* into, float* dw, float* sum,
                        float* sum_x) {
  const Index threads = std::max<Index>(1, pool.num_threads()), wide = round_up(m, PANEL), panels = (c + PANEL - 1) / PANEL;
  const Index pitch_n = pitch(c), pitch_d = pitch(wide), tap = 0;
  Conv g{1, pixels, 1, c, pitch_x, 1, 1, 1, 1, 0, 0, pixels, 1, m, m};
  g.simplify();
  const auto strips = strips_of(g, pitch_n + pitch_d + PANEL, threads, 0);
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
        pack_pixel(dz + (first + p) * m, dy + p * pitch_d, m, [&](Lanes d, Index k) {
          Lanes v = {};
          if (k + LANES <= m)
            v = load(at + k);
          else
            std::memcpy(&v, at + k, 4 * (m - k));
          return load(scale + k) * d + load(shift + k) + load(slope + k) * v;
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

// ------------------------------------------------------------------------------- depthwise convolutions, norms

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
  const Index rows = g.rows(), chunks = std::min<Index>(rows, 8 * std::max<Index>(1, pool.num_threads()));
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

// The gradient [kh, kw, 1, c] of a depthwise convolution with respect to its kernel.
void depthwise_kernel_gradient(ffi::ThreadPool& pool, const Conv& g, const float* x, const float* y, float* out) {
  const Index threads = std::max<Index>(1, pool.num_threads()), taps = g.kh * g.kw, wide = round_up(g.c, LANES);
  const Index chunk = std::min<Index>(wide, 16 * LANES);  // channels at once: so many that their rows stay in the cache
  const auto strips = strips_of(g, g.sh * g.row_p() * pitch(chunk), threads, std::max<Index>(0, g.kh - g.sh));
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
        const Packed packed = pack(part, s, x + first, scratch(0, packed_floats(part, s.end - s.first)), Same());
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
  for (Index t = 0; t < taps; t++) {
    for (Index k = 0; k < g.c; k++) {
      float total = 0;
      for (Index slot = 0; slot < threads; slot++) total += parts[(slot * taps + t) * wide + k];
      out[t * g.c + k] = total;
    }
  }
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

// Sums over pixels of dy and of dy * x, by channel.
void channel_sums_of(ffi::ThreadPool& pool, const float* dy, const float* x, Index pixels, Index c, float* sum, float* sum_x) {
  const Index parts = parts_of(pixels, 2 * c);
  ChannelSums sums(c, parts);
  parallel(pool, parts, [&](Index i) {
    float *__restrict first = sums.first.data() + i * c, *__restrict second = sums.second.data() + i * c;
    for (Index p = pixels * i / parts; p < pixels * (i + 1) / parts; p++) {
      const float *d = dy + p * c, *v = x + p * c;
      for (Index k = 0; k < c; k++) first[k] += d[k], second[k] += d[k] * v[k];
    }
  });
  sums.finish(sum, sum_x);
}

}  // namespace

// --------------------------------------------------------------------------------------------------- handlers

namespace {

using Window = ffi::Span<const int64_t>;  // strides and padding before: rows, columns

Conv unsimplified(const Map& x, Index kh, Index kw, Window window, const Map& y) {
  const auto in = x.dimensions(), out = y.dimensions();
  return {in[0], in[1], in[2], in[3], in[3], kh, kw, window[0], window[1], window[2], window[3],
          out[1], out[2], out[3], out[3]};
}

Conv geometry(const Map& x, Index kh, Index kw, Window window, const Map& y) {
  Conv g = unsimplified(x, kh, kw, window, y);
  g.simplify();
  return g;
}

ffi::Error conv(ffi::ThreadPool pool, Map x, Map w, MapResult y, Window window, bool turned) {
  const auto k = w.dimensions();
  const Conv g = geometry(x, k[0], k[1], window, *y);
  const Index inputs = k[2], outputs = k[3], tap = inputs * outputs;
  const auto panels = turned ? panels_of(pool, w.typed_data(), g.kh * g.kw, outputs, inputs, tap, 1, outputs, true)
                             : panels_of(pool, w.typed_data(), g.taps(), g.depth(), outputs, tap, outputs, 1, false);
  convolve(pool, g, x.typed_data(), Same(), panels, y->typed_data());
  return ffi::Error::Success();
}

ffi::Error conv_kernel_gradient(ffi::ThreadPool pool, Map x, Map y, MapResult w, Window window) {
  const auto k = w->dimensions();
  const Conv g = geometry(x, k[0], k[1], window, y);
  kernel_gradient(pool, g, x.typed_data(), y.typed_data(), w->typed_data());
  return ffi::Error::Success();
}

// y = conv(relu(factor * x + offset), w) of the first channels of x, stride 1, padding "SAME", and the moments of y;
// written to the channels of `y` from `channel` on.
ffi::Error norm_conv(ffi::ThreadPool pool, Map x, Vector factor, Vector offset, Map w, MapResult y, VectorResult mean,
                     VectorResult variance, Index channel) {
  const auto k = w.dimensions();
  const int64_t window[] = {1, 1, k[0] / 2, k[1] / 2};
  Conv g = geometry(x, k[0], k[1], Window(window, 4), *y);
  g.c = k[2], g.n = k[3];
  g.unfold = false;
  const auto panels = panels_of(pool, w.typed_data(), g.taps(), g.c, g.n, g.c * g.n, g.n, 1, false);
  const auto f = padded(factor.typed_data(), g.c), o = padded(offset.typed_data(), g.c);
  std::unique_ptr<Moments> moments;
  convolve(pool, g, x.typed_data(), NormRelu{f.data(), o.data()}, panels, y->typed_data() + channel, &moments);
  moments->finish(mean->typed_data(), variance->typed_data());
  return ffi::Error::Success();
}

// The result is `buffer` but for those channels; XLA gives both the same memory.
ffi::Error norm_conv_into(ffi::ThreadPool pool, Map x, Vector factor, Vector offset, Map w, Map buffer, MapResult y,
                          VectorResult mean, VectorResult variance, Index channel) {
  if (buffer.typed_data() != y->typed_data()) std::memcpy(y->typed_data(), buffer.typed_data(), buffer.size_bytes());
  return norm_conv(std::move(pool), x, factor, offset, w, y, mean, variance, channel);
}

ffi::Error norm_conv_backward(ffi::ThreadPool pool, Map x, Vector factor, Vector offset, Map w, Map dy, MapResult dz,
                              MapResult dw, VectorResult sum, VectorResult sum_x) {
  const auto k = w.dimensions();
  const int64_t window[] = {1, 1, k[0] / 2, k[1] / 2};
  Conv g = geometry(dy, k[0], k[1], Window(window, 4), x);
  g.unfold = false;
  const auto turned = panels_of(pool, w.typed_data(), k[0] * k[1], k[3], k[2], k[2] * k[3], 1, k[3], true);
  const auto f = padded(factor.typed_data(), g.n), o = padded(offset.typed_data(), g.n);
  spatial_backward(pool, g, x.typed_data(), NormRelu{f.data(), o.data()}, dy.typed_data(), turned, dz->typed_data(),
                   dw->typed_data(), sum->typed_data(), sum_x->typed_data());
  return ffi::Error::Success();
}

ffi::Error norm_product_backward(ffi::ThreadPool pool, Map x, Vector factor, Vector offset, Map w, Map dz, Map y,
                                 Vector scale, Vector shift, Vector slope, Map into, MapResult sums, MapResult dw,
                                 VectorResult sum, VectorResult sum_x) {
  if (into.typed_data() != sums->typed_data()) std::memcpy(sums->typed_data(), into.typed_data(), into.size_bytes());
  const auto size = x.dimensions();
  const Index c = w.dimensions()[2], m = w.dimensions()[3];
  const auto transposed = panels_of(pool, w.typed_data(), 1, m, c, 0, 1, m, false);
  const auto f = padded(factor.typed_data(), c), o = padded(offset.typed_data(), c), a = padded(scale.typed_data(), m);
  const auto b = padded(shift.typed_data(), m), s = padded(slope.typed_data(), m);
  pointwise_backward(pool, size[0] * size[1] * size[2], c, size[3], m, x.typed_data(), NormRelu{f.data(), o.data()},
                     dz.typed_data(), y.typed_data(), a.data(), b.data(), s.data(), transposed, sums->typed_data(),
                     dw->typed_data(), sum->typed_data(), sum_x->typed_data());
  return ffi::Error::Success();
}

// `back`: the gradient with respect to the input, of the shape of y, from that of the result.
ffi::Error depthwise_conv(ffi::ThreadPool pool, Map x, Map w, MapResult y, Window window, bool back) {
  const auto k = w.dimensions();
  const Conv g = unsimplified(x, k[0], k[1], window, *y);
  depthwise(pool, g, x.typed_data(), w.typed_data(), y->typed_data(), back);
  return ffi::Error::Success();
}

ffi::Error depthwise_conv_kernel_gradient(ffi::ThreadPool pool, Map x, Map y, MapResult w, Window window) {
  const auto k = w->dimensions();
  const Conv g = unsimplified(x, k[0], k[1], window, y);
  depthwise_kernel_gradient(pool, g, x.typed_data(), y.typed_data(), w->typed_data());
  return ffi::Error::Success();
}

ffi::Error moments(ffi::ThreadPool pool, Map x, VectorResult mean, VectorResult variance) {
  const Index c = x.dimensions()[3];
  moments_of(pool, x.typed_data(), x.element_count() / c, c, mean->typed_data(), variance->typed_data());
  return ffi::Error::Success();
}

ffi::Error channel_sums(ffi::ThreadPool pool, Map dy, Map x, VectorResult sum, VectorResult sum_x) {
  const Index c = x.dimensions()[3];
  channel_sums_of(pool, dy.typed_data(), x.typed_data(), x.element_count() / c, c, sum->typed_data(), sum_x->typed_data());
  return ffi::Error::Success();
}

}  // namespace

#define MAP Arg<Map>()
#define VECTOR Arg<Vector>()
#define MAP_OUT Ret<Map>()
#define VECTOR_OUT Ret<Vector>()
#define CHANNEL Attr<int64_t>("channel")
#define HANDLER(name, ...) XLA_FFI_DEFINE_HANDLER_SYMBOL(bmjax_##name, name, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().__VA_ARGS__)

HANDLER(conv, MAP.MAP.MAP_OUT.Attr<Window>("window").Attr<bool>("turned"));
HANDLER(conv_kernel_gradient, MAP.MAP.MAP_OUT.Attr<Window>("window"));
HANDLER(norm_conv, MAP.VECTOR.VECTOR.MAP.MAP_OUT.VECTOR_OUT.VECTOR_OUT.CHANNEL);
HANDLER(norm_conv_into, MAP.VECTOR.VECTOR.MAP.MAP.MAP_OUT.VECTOR_OUT.VECTOR_OUT.CHANNEL);
HANDLER(norm_conv_backward, MAP.VECTOR.VECTOR.MAP.MAP.MAP_OUT.MAP_OUT.VECTOR_OUT.VECTOR_OUT);
HANDLER(norm_product_backward,
        MAP.VECTOR.VECTOR.MAP.MAP.MAP.VECTOR.VECTOR.VECTOR.MAP.MAP_OUT.MAP_OUT.VECTOR_OUT.VECTOR_OUT);
HANDLER(depthwise_conv, MAP.MAP.MAP_OUT.Attr<Window>("window").Attr<bool>("back"));
HANDLER(depthwise_conv_kernel_gradient, MAP.MAP.MAP_OUT.Attr<Window>("window"));
HANDLER(moments, MAP.VECTOR_OUT.VECTOR_OUT);
HANDLER(channel_sums, MAP.MAP.VECTOR_OUT.VECTOR_OUT);
