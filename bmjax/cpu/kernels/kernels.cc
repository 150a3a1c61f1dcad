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
  kernel_gradient(pool, g, x.typed_data(), Same(), y.typed_data(), w->typed_data());
  return ffi::Error::Success();
}

// relu(factor * x + offset), each [c], while x is packed.
struct Before {
  std::vector<float> factor, offset;
  Before(const Vector& f, const Vector& o)
      : factor(padded(f.typed_data(), f.element_count())), offset(padded(o.typed_data(), o.element_count())) {}
  NormRelu relu() const { return {factor.data(), offset.data()}; }
};

ffi::Error normed_conv(ffi::ThreadPool pool, Map x, Vector factor, Vector offset, Map w, MapResult y, Window window) {
  const auto k = w.dimensions();
  Conv g = geometry(x, k[0], k[1], window, *y);
  g.unfold = false;
  const auto panels = panels_of(pool, w.typed_data(), g.taps(), g.c, g.n, g.c * g.n, g.n, 1, false);
  const Before before(factor, offset);
  convolve(pool, g, x.typed_data(), before.relu(), panels, y->typed_data());
  return ffi::Error::Success();
}

ffi::Error normed_conv_kernel_gradient(ffi::ThreadPool pool, Map x, Vector factor, Vector offset, Map y, MapResult w,
                                       Window window) {
  const auto k = w->dimensions();
  Conv g = geometry(x, k[0], k[1], window, y);
  g.unfold = false;
  const Before before(factor, offset);
  kernel_gradient(pool, g, x.typed_data(), before.relu(), y.typed_data(), w->typed_data());
  return ffi::Error::Success();
}

ffi::Error normed_depthwise_conv(ffi::ThreadPool pool, Map x, Vector factor, Vector offset, Map w, MapResult y, Window window) {
  const auto k = w.dimensions();
  const Conv g = unsimplified(x, k[0], k[1], window, *y);
  const Before before(factor, offset);
  normed_depthwise(pool, g, x.typed_data(), before.relu(), w.typed_data(), y->typed_data());
  return ffi::Error::Success();
}

ffi::Error normed_depthwise_conv_kernel_gradient(ffi::ThreadPool pool, Map x, Vector factor, Vector offset, Map y, MapResult w,
                                                 Window window) {
  const auto k = w->dimensions();
  const Conv g = unsimplified(x, k[0], k[1], window, y);
  const Before before(factor, offset);
  depthwise_kernel_gradient(pool, g, x.typed_data(), before.relu(), y.typed_data(), w->typed_data());
  return ffi::Error::Success();
}

// y = conv(relu(norm(x)), w) of the first channels of x, stride 1, padding "SAME", and the moments of y where `mean` is
// given; written to the channels of `y` from `channel` on.
void norm_conv_to(ffi::ThreadPool& pool, const Map& x, const Norm& norm, const Map& w, Map& y, Index channel, float* mean,
                  float* variance) {
  const auto k = w.dimensions();
  const int64_t window[] = {1, 1, k[0] / 2, k[1] / 2};
  Conv g = geometry(x, k[0], k[1], Window(window, 4), y);
  g.c = k[2], g.n = k[3];
  g.unfold = false;
  const auto panels = panels_of(pool, w.typed_data(), g.taps(), g.c, g.n, g.c * g.n, g.n, 1, false);
  std::unique_ptr<Moments> moments;
  convolve(pool, g, x.typed_data(), norm.relu(), panels, y.typed_data() + channel, mean ? &moments : nullptr);
  if (mean) moments->finish(mean, variance);
}

Norm norm_of(const Vector& scale, const Vector& bias, const Vector& mean, const Vector& variance, double epsilon) {
  return {scale.dimensions()[0], scale.typed_data(), bias.typed_data(), mean.typed_data(), variance.typed_data(), epsilon};
}

ffi::Error norm_conv(ffi::ThreadPool pool, Map x, Vector scale, Vector bias, Vector mean, Vector variance, Map w, MapResult y,
                     VectorResult y_mean, VectorResult y_variance, double epsilon, bool moments) {
  norm_conv_to(pool, x, norm_of(scale, bias, mean, variance, epsilon), w, *y, 0, moments ? y_mean->typed_data() : nullptr,
               y_variance->typed_data());
  if (!moments) {
    std::fill_n(y_mean->typed_data(), y_mean->element_count(), 0.f);
    std::fill_n(y_variance->typed_data(), y_variance->element_count(), 0.f);
  }
  return ffi::Error::Success();
}

// The memory of an argument that becomes a result; XLA gives both the same where it can.
template <typename A, typename R>
void keep(const A& from, R& to) {
  if (from.typed_data() != to->typed_data()) std::memcpy(to->typed_data(), from.typed_data(), from.size_bytes());
}

// The results are `buffer`, `means` and `variances` but for the channels from `channel` on.
ffi::Error norm_conv_into(ffi::ThreadPool pool, Map x, Vector scale, Vector bias, Vector mean, Vector variance, Map w,
                          Map buffer, Vector means, Vector variances, MapResult y, VectorResult y_means,
                          VectorResult y_variances, double epsilon, Index channel, bool moments) {
  keep(buffer, y);
  keep(means, y_means);
  keep(variances, y_variances);
  norm_conv_to(pool, x, norm_of(scale, bias, mean, variance, epsilon), w, *y, channel,
               moments ? y_means->typed_data() + channel : nullptr, y_variances->typed_data() + channel);
  return ffi::Error::Success();
}

ffi::Error norm_conv_backward(ffi::ThreadPool pool, Map x, Vector scale, Vector bias, Vector mean, Vector variance, Map w,
                              Map y, Vector y_mean, Map dy, Vector dmeans, Vector dvariances, MapResult dz, MapResult dw,
                              VectorResult dscale, VectorResult dbias, VectorResult dmean, VectorResult dvariance,
                              double epsilon, Index channel, Index count) {
  const auto k = w.dimensions();
  const int64_t window[] = {1, 1, k[0] / 2, k[1] / 2};
  Conv g = unsimplified(dy, k[0], k[1], Window(window, 4), x);
  g.c = k[3];
  const auto turned = panels_of(pool, w.typed_data(), k[0] * k[1], k[3], k[2], k[2] * k[3], 1, k[3], true);
  const Norm norm = norm_of(scale, bias, mean, variance, epsilon);
  const ThroughStatistics through(g.c, y_mean.typed_data() + channel, dmeans.typed_data() + channel,
                                  dvariances.typed_data() + channel, count);
  const float* d = dy.typed_data() + channel;
  std::vector<float> total_x(norm.c);
  auto back = [&](const auto& change) {
    spatial_backward(pool, g, x.typed_data(), norm.relu(), d, change, turned, dz->typed_data(), dw->typed_data(),
                     dbias->typed_data(), total_x.data());
  };
  if (count)
    back(PlusAffine{d, y.typed_data() + channel, through.shift.data(), through.slope.data()});
  else
    back(Same());
  norm.back(dbias->typed_data(), total_x.data(), dscale->typed_data(), dmean->typed_data(), dvariance->typed_data(), false);
  return ffi::Error::Success();
}

ffi::Error norm_product_backward(ffi::ThreadPool pool, Map x, Vector scale, Vector bias, Vector mean, Vector variance, Map w,
                                 Map dz, Map y, Vector y_scale, Vector y_mean, Vector y_variance, Vector y_dmean,
                                 Vector y_dvariance, Map into, Vector into_mean, Vector into_variance, MapResult sums,
                                 MapResult dw, VectorResult dscale, VectorResult dbias, VectorResult dmean,
                                 VectorResult dvariance, double epsilon, Index count) {
  keep(into, sums);
  keep(into_mean, dmean);
  keep(into_variance, dvariance);
  const auto size = x.dimensions();
  const Index c = w.dimensions()[2], m = w.dimensions()[3];
  const auto transposed = panels_of(pool, w.typed_data(), 1, m, c, 0, 1, m, false);
  const Norm norm = norm_of(scale, bias, mean, variance, epsilon);
  const Norm after(m, y_scale.typed_data(), nullptr, y_mean.typed_data(), y_variance.typed_data(), epsilon);
  const ThroughStatistics through(m, y_mean.typed_data(), y_dmean.typed_data(), y_dvariance.typed_data(), count);
  std::vector<float> total_x(c);
  pointwise_backward(pool, size[0] * size[1] * size[2], c, size[3], m, x.typed_data(), norm.relu(), dz.typed_data(),
                     y.typed_data(), after.factor.data(), through.shift.data(), through.slope.data(), transposed,
                     sums->typed_data(), dw->typed_data(), dbias->typed_data(), total_x.data());
  norm.back(dbias->typed_data(), total_x.data(), dscale->typed_data(), dmean->typed_data(), dvariance->typed_data(), true);
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
  depthwise_kernel_gradient(pool, g, x.typed_data(), Same(), y.typed_data(), w->typed_data());
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
  const auto as_it_is = [](float d, float, Index) { return d; };
  channel_sums_of(pool, dy.typed_data(), x.typed_data(), x.element_count() / c, c, as_it_is, sum->typed_data(),
                  sum_x->typed_data());
  return ffi::Error::Success();
}

// The same of the gradient through a ReLU: dy where factor * x + offset is positive, else 0.
ffi::Error relu_sums(ffi::ThreadPool pool, Map dy, Map x, Vector factor, Vector offset, VectorResult sum, VectorResult sum_x) {
  const Index c = x.dimensions()[3];
  const float *__restrict f = factor.typed_data(), *__restrict o = offset.typed_data();
  const auto through = [=](float d, float v, Index k) { return f[k] * v + o[k] > 0 ? d : 0.f; };
  channel_sums_of(pool, dy.typed_data(), x.typed_data(), x.element_count() / c, c, through, sum->typed_data(),
                  sum_x->typed_data());
  return ffi::Error::Success();
}

ffi::Error after(ffi::AnyBuffer value, ffi::AnyBuffer, ffi::Result<ffi::AnyBuffer> same) {
  std::memcpy(same->untyped_data(), value.untyped_data(), value.size_bytes());
  return ffi::Error::Success();
}

}  // namespace

#define MAP Arg<Map>()
#define VECTOR Arg<Vector>()
#define MAP_OUT Ret<Map>()
#define VECTOR_OUT Ret<Vector>()
#define NORM VECTOR.VECTOR.VECTOR.VECTOR
#define NORM_OUT VECTOR_OUT.VECTOR_OUT.VECTOR_OUT.VECTOR_OUT
#define EPSILON Attr<double>("epsilon")
#define HANDLER(name, ...) XLA_FFI_DEFINE_HANDLER_SYMBOL(bmjax_##name, name, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().__VA_ARGS__)

HANDLER(conv, MAP.MAP.MAP_OUT.Attr<Window>("window").Attr<bool>("turned"));
HANDLER(conv_norm, MAP.MAP.VECTOR.VECTOR.MAP_OUT.Attr<Window>("window").Attr<bool>("relu"));
HANDLER(conv_norm_add, MAP.MAP.VECTOR.VECTOR.MAP.MAP_OUT.Attr<Window>("window").Attr<bool>("relu"));
HANDLER(conv_kernel_gradient, MAP.MAP.MAP_OUT.Attr<Window>("window"));
HANDLER(norm_conv, MAP.NORM.MAP.MAP_OUT.VECTOR_OUT.VECTOR_OUT.EPSILON.Attr<bool>("moments"));
HANDLER(norm_conv_into, MAP.NORM.MAP.MAP.VECTOR.VECTOR.MAP_OUT.VECTOR_OUT.VECTOR_OUT.EPSILON.Attr<int64_t>("channel")
                            .Attr<bool>("moments"));
HANDLER(norm_conv_backward, MAP.NORM.MAP.MAP.VECTOR.MAP.VECTOR.VECTOR.MAP_OUT.MAP_OUT.NORM_OUT.EPSILON
                                .Attr<int64_t>("channel").Attr<int64_t>("count"));
HANDLER(norm_product_backward, MAP.NORM.MAP.MAP.MAP.VECTOR.VECTOR.VECTOR.VECTOR.VECTOR.MAP.VECTOR.VECTOR.MAP_OUT.MAP_OUT
                                   .NORM_OUT.EPSILON.Attr<int64_t>("count"));
HANDLER(depthwise_conv, MAP.MAP.MAP_OUT.Attr<Window>("window").Attr<bool>("back"));
HANDLER(depthwise_conv_kernel_gradient, MAP.MAP.MAP_OUT.Attr<Window>("window"));
HANDLER(normed_conv, MAP.VECTOR.VECTOR.MAP.MAP_OUT.Attr<Window>("window"));
HANDLER(normed_conv_kernel_gradient, MAP.VECTOR.VECTOR.MAP.MAP_OUT.Attr<Window>("window"));
HANDLER(normed_depthwise_conv, MAP.VECTOR.VECTOR.MAP.MAP_OUT.Attr<Window>("window"));
HANDLER(normed_depthwise_conv_kernel_gradient, MAP.VECTOR.VECTOR.MAP.MAP_OUT.Attr<Window>("window"));
HANDLER(max_pool_backward, MAP.Arg<Places>().MAP_OUT.Attr<Window>("window"));
HANDLER(moments, MAP.VECTOR_OUT.VECTOR_OUT);
HANDLER(channel_sums, MAP.MAP.VECTOR_OUT.VECTOR_OUT);
HANDLER(relu_sums, MAP.MAP.VECTOR.VECTOR.VECTOR_OUT.VECTOR_OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(bmjax_after, after,
                              ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
