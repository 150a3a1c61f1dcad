// Convolutions and dense layers on CPUs, as custom calls of XLA: float32, NHWC, kernels HWIO.
//
// XLA's CPU backend transposes whole feature maps for the gradient of a convolution with respect to its kernel, and
// reads a map again for each norm, ReLU and sum around one. Here a few rows of pixels are packed (padded, normalised,
// ReLU applied) into memory that stays in the second-level cache, and all that needs them is computed there, on
// register tiles of TILE pixels by PANEL channels (Goto and van de Geijn 2008, doi:10.1145/1356052.1356053; the direct
// convolution of Zhang et al. 2018, arXiv:1809.10170). What each function computes is written down in jax.numpy
// where it is called (the reference of bmjax.native.call), and the tests hold it to that.
//
// Work is divided by the sizes alone and partial sums are added in a fixed order: the same input gives the same bits.

#include "dense.h"
#include "maps.h"

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

// factor * conv(x, w) + offset, and its positive part where `relu` is set.
ffi::Error finished_conv(ffi::ThreadPool& pool, const Map& x, const Map& w, const Vector& factor, const Vector& offset,
                         const float* add, Map& y, Window window, bool relu) {
  const auto k = w.dimensions();
  const Conv g = geometry(x, k[0], k[1], window, y);
  const auto panels = panels_of(pool, w.typed_data(), g.taps(), g.depth(), k[3], k[2] * k[3], k[3], 1, false);
  const auto f = padded(factor.typed_data(), g.n), o = padded(offset.typed_data(), g.n);
  convolve(pool, g, x.typed_data(), Same(), panels, y.typed_data(), nullptr, Affine{g.n, f.data(), o.data(), add, relu});
  return ffi::Error::Success();
}

ffi::Error conv_norm(ffi::ThreadPool pool, Map x, Map w, Vector factor, Vector offset, MapResult y, Window window, bool relu) {
  return finished_conv(pool, x, w, factor, offset, nullptr, *y, window, relu);
}

// The same with a map of the result's shape added before the positive part is taken.
ffi::Error conv_norm_add(ffi::ThreadPool pool, Map x, Map w, Vector factor, Vector offset, Map add, MapResult y, Window window,
                         bool relu) {
  return finished_conv(pool, x, w, factor, offset, add.typed_data(), *y, window, relu);
}

ffi::Error conv_kernel_gradient(ffi::ThreadPool pool, Map x, Map y, MapResult w, Window window) {
  const auto k = w->dimensions();
  const Conv g = geometry(x, k[0], k[1], window, y);
  kernel_gradient(pool, g, x.typed_data(), y.typed_data(), w->typed_data());
  return ffi::Error::Success();
}

// y = conv(relu(factor * x + offset), w) of the first channels of x, stride 1, padding "SAME", and the moments of y, or
// zeros where nobody asks for them; written to the channels of `y` from `channel` on.
ffi::Error norm_conv(ffi::ThreadPool pool, Map x, Vector factor, Vector offset, Map w, MapResult y, VectorResult mean,
                     VectorResult variance, Index channel, bool with_moments) {
  const auto k = w.dimensions();
  const int64_t window[] = {1, 1, k[0] / 2, k[1] / 2};
  Conv g = geometry(x, k[0], k[1], Window(window, 4), *y);
  g.c = k[2], g.n = k[3];
  g.unfold = false;
  const auto panels = panels_of(pool, w.typed_data(), g.taps(), g.c, g.n, g.c * g.n, g.n, 1, false);
  const auto f = padded(factor.typed_data(), g.c), o = padded(offset.typed_data(), g.c);
  std::unique_ptr<Moments> moments;
  convolve(pool, g, x.typed_data(), NormRelu{f.data(), o.data()}, panels, y->typed_data() + channel,
           with_moments ? &moments : nullptr);
  if (with_moments) {
    moments->finish(mean->typed_data(), variance->typed_data());
  } else {
    std::fill_n(mean->typed_data(), g.n, 0.f);
    std::fill_n(variance->typed_data(), g.n, 0.f);
  }
  return ffi::Error::Success();
}

// The result is `buffer` but for those channels; XLA gives both the same memory.
ffi::Error norm_conv_into(ffi::ThreadPool pool, Map x, Vector factor, Vector offset, Map w, Map buffer, MapResult y,
                          VectorResult mean, VectorResult variance, Index channel, bool with_moments) {
  if (buffer.typed_data() != y->typed_data()) std::memcpy(y->typed_data(), buffer.typed_data(), buffer.size_bytes());
  return norm_conv(std::move(pool), x, factor, offset, w, y, mean, variance, channel, with_moments);
}

ffi::Error norm_conv_backward(ffi::ThreadPool pool, Map x, Vector factor, Vector offset, Map w, Map dy, MapResult dz,
                              MapResult dw, VectorResult sum, VectorResult sum_x) {
  const auto k = w.dimensions();
  const int64_t window[] = {1, 1, k[0] / 2, k[1] / 2};
  const Conv g = unsimplified(dy, k[0], k[1], Window(window, 4), x);
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

// `window`: size, stride, padding before rows and columns.
ffi::Error max_pool_backward(ffi::ThreadPool pool, Map dy, Places place, MapResult dx, Window window) {
  const auto out = dy.dimensions(), in = dx->dimensions();
  max_pool_backward_of(pool, dy.typed_data(), place.typed_data(), in[0], out[1], out[2], in[3], in[1], in[2], window[0],
                       window[1], window[2], window[3], dx->typed_data());
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
#define WHERE Attr<int64_t>("channel").Attr<bool>("moments")
#define HANDLER(name, ...) XLA_FFI_DEFINE_HANDLER_SYMBOL(bmjax_##name, name, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().__VA_ARGS__)

HANDLER(conv, MAP.MAP.MAP_OUT.Attr<Window>("window").Attr<bool>("turned"));
HANDLER(conv_norm, MAP.MAP.VECTOR.VECTOR.MAP_OUT.Attr<Window>("window").Attr<bool>("relu"));
HANDLER(conv_norm_add, MAP.MAP.VECTOR.VECTOR.MAP.MAP_OUT.Attr<Window>("window").Attr<bool>("relu"));
HANDLER(conv_kernel_gradient, MAP.MAP.MAP_OUT.Attr<Window>("window"));
HANDLER(norm_conv, MAP.VECTOR.VECTOR.MAP.MAP_OUT.VECTOR_OUT.VECTOR_OUT.WHERE);
HANDLER(norm_conv_into, MAP.VECTOR.VECTOR.MAP.MAP.MAP_OUT.VECTOR_OUT.VECTOR_OUT.WHERE);
HANDLER(norm_conv_backward, MAP.VECTOR.VECTOR.MAP.MAP.MAP_OUT.MAP_OUT.VECTOR_OUT.VECTOR_OUT);
HANDLER(norm_product_backward,
        MAP.VECTOR.VECTOR.MAP.MAP.MAP.VECTOR.VECTOR.VECTOR.MAP.MAP_OUT.MAP_OUT.VECTOR_OUT.VECTOR_OUT);
HANDLER(depthwise_conv, MAP.MAP.MAP_OUT.Attr<Window>("window").Attr<bool>("back"));
HANDLER(depthwise_conv_kernel_gradient, MAP.MAP.MAP_OUT.Attr<Window>("window"));
HANDLER(max_pool_backward, MAP.Arg<Places>().MAP_OUT.Attr<Window>("window"));
HANDLER(moments, MAP.VECTOR_OUT.VECTOR_OUT);
HANDLER(channel_sums, MAP.MAP.VECTOR_OUT.VECTOR_OUT);
