// The operators of a compiled graph on the CPU, which torch's dispatcher calls without Python in between: their overload
// "native". Between two products of a step nothing of Python is left in the caches, and a call through it takes longer
// than a small product. What is not taken on here is left to the operator in Python, which computes by other means or
// says what is wrong. That an activation and its threshold go together the fake has seen, when the graph was made.

#include <pthread.h>

#include <algorithm>
#include <initializer_list>
#include <mutex>
#include <new>
#include <optional>
#include <shared_mutex>
#include <string_view>
#include <vector>

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "calls.h"

namespace {

using at::Tensor;
typedef std::optional<Tensor> Maybe;

int (*run_mlp)(const Call*);
int (*run_linear)(const LinearCall*);
int (*run_linears)(const LinearCalls*);
int (*run_attention)(const AttentionCall*);

// A weight's layout is not changed while it is looked at, nor looked at while it is changed (layout.py).
std::shared_mutex changing;
// Addresses of the weights that Python has advice for (advice.py).
thread_local std::vector<int64_t> advised;
thread_local bool changes = false;  // whether this thread holds that for itself
// The threads of OpenMP do not survive a fork.
bool forked = false;

const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  forked = true;
  new (&changing) std::shared_mutex;  // another thread may have held it
  changes = false;
});

int threads() { return forked ? 1 : at::get_num_threads(); }

#define HFS_TEXT(...) #__VA_ARGS__
#define HFS_LIST(...) HFS_TEXT(__VA_ARGS__)

// The place of an activation in the list that the kernels are built with; -1 if it is not there.
int code_of(std::string_view name) {
  std::string_view rest = HFS_LIST(HFS_ACTIVATIONS);
  for (int code = 0; !rest.empty(); ++code) {
    rest.remove_prefix(std::min(rest.find_first_not_of(' '), rest.size()));
    const size_t end = std::min(rest.find(','), rest.size());
    if (rest.substr(0, end) == name) return code;
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  return -1;
}

int code_of(at::ScalarType dtype) {
  return dtype == at::kFloat ? 0 : dtype == at::kBFloat16 ? 1 : dtype == at::kHalf ? 2 : -1;
}

bool fits(const Tensor& t, at::ScalarType dtype, std::initializer_list<int64_t> shape) {
  return t.scalar_type() == dtype && t.sizes() == at::IntArrayRef(shape);
}

bool fits(const Maybe& t, at::ScalarType dtype, std::initializer_list<int64_t> shape) {
  return !t || fits(*t, dtype, shape);
}

// A weight [rows, columns] as it was at one moment.
struct Matrix {
  c10::Storage storage;  // which keeps the memory
  int64_t row, column, offset;

  Matrix(const Tensor& w) : storage(w.storage()), row(w.stride(0)), column(w.stride(1)), offset(w.storage_offset()) {}

  const void* address(at::ScalarType dtype) const {
    return (const char*)storage.data() + offset * int64_t(c10::elementSize(dtype));
  }
};

// Of weights that are int8, one for each output; null where there is no such weight.
struct Scales {
  const Tensor *first = nullptr, *up = nullptr, *down = nullptr;
};

bool is_advised(const void* address) {
  return std::binary_search(advised.begin(), advised.end(), int64_t(address));
}

// A tensor whose elements lie in order, and are there as long as this is.
struct Contiguous {
  Tensor held;
  const void* address = nullptr;

  Contiguous(const Tensor* t) {
    if (t) held = t->contiguous(), address = held.const_data_ptr();
  }
  Contiguous(const Maybe& t) : Contiguous(t ? &*t : nullptr) {}
};

Tensor empty(const Tensor& x, int64_t last) {
  auto sizes = x.sizes().vec();
  sizes.back() = last;
  return at::detail::empty_cpu(sizes, x.scalar_type());
}

// [..., D] of an MLP, of which `first` and `up` are null if all that there is to do is the down projection of x = h.
std::optional<Tensor> mlp(const Tensor& x, const Tensor* first, const Tensor* up, const Tensor& down,
                          const Maybe& first_bias, const Maybe& up_bias, const Maybe& down_bias, const Maybe& thresholds,
                          int kind, double threshold, const Scales& scales = {}) {
  const auto dtype = x.scalar_type(), stored = scales.down ? at::kChar : dtype;
  if (code_of(dtype) < 0 || kind < 0 || x.dim() < 1 || down.dim() != 2 || !x.numel() || !down.numel()) return {};
  const int64_t D = down.size(0), F = down.size(1), T = x.numel() / x.size(-1);
  if (x.size(-1) != (first ? D : F) || down.scalar_type() != stored || (scales.down && T > kMaxTokens)) return {};
  for (const Tensor* w : {first, up})
    if (w && !fits(*w, stored, {F, D})) return {};
  for (const Tensor* one : {scales.first, scales.up})
    if (one && !fits(*one, at::kFloat, {F})) return {};
  if (scales.down && !fits(*scales.down, at::kFloat, {D})) return {};
  for (const Maybe* v : {&first_bias, &up_bias, &thresholds})
    if (!fits(*v, dtype, {F})) return {};
  if (!fits(down_bias, dtype, {D})) return {};
  std::optional<Matrix> gate, second, last;
  {
    std::shared_lock lock(changing);
    if (first) gate.emplace(*first);
    if (up) second.emplace(*up);
    last.emplace(down);
  }
  const auto in_rows = [](const std::optional<Matrix>& w, int64_t columns) {
    return !w || w->column == 1 || columns == 1;
  };
  const bool neuron_major = (last->row == 1 || D == 1) && (last->column == D || F == 1);
  if (!neuron_major || !in_rows(gate, D) || !in_rows(second, D)) return {};
  const Contiguous input(x), biases[] = {first_bias, up_bias, down_bias}, each(thresholds);
  const void* const deciding = gate ? gate->address(stored) : nullptr;
  if (T == 1 && gate && is_advised(deciding)) return {};
  Tensor y = empty(x, D);
  Call call = {};
  call.x = input.address, call.gate = deciding, call.up = second ? second->address(stored) : nullptr;
  call.down = last->address(stored), call.y = y.mutable_data_ptr();
  call.gate_bias = biases[0].address, call.up_bias = biases[1].address, call.down_bias = biases[2].address;
  call.thresholds = each.address, call.threshold = float(threshold);
  const Contiguous factors[] = {scales.first, scales.up, scales.down};
  call.gate_scales = (const float*)factors[0].address, call.up_scales = (const float*)factors[1].address;
  call.down_scales = (const float*)factors[2].address;
  call.T = T, call.D = D, call.F = F;
  call.gate_stride = gate ? gate->row : 0, call.up_stride = second ? second->row : 0, call.down_stride = last->column;
  call.dtype = code_of(dtype), call.kind = kind, call.threads = threads();
  return run_mlp(&call) ? std::optional<Tensor>() : y;
}

// A dense product that can be made, with what it is made of.
struct Product {
  LinearCall call = {};
  Tensor y;

  static std::optional<Product> of(const Tensor& x, const Tensor& weight, const Maybe& bias,
                                   const Tensor* scale = nullptr) {
    const auto dtype = x.scalar_type(), stored = scale ? at::kChar : dtype;
    if (code_of(dtype) < 0 || x.dim() < 1 || weight.dim() != 2 || !x.numel() || !weight.numel()) return {};
    const int64_t D = weight.size(0), F = weight.size(1), T = x.numel() / x.size(-1);
    if (x.size(-1) != F || T > kFewTokens || weight.scalar_type() != stored || !fits(bias, dtype, {D})) return {};
    if (scale && !fits(*scale, at::kFloat, {D})) return {};
    std::optional<Matrix> w;
    {
      std::shared_lock lock(changing);
      w.emplace(weight);
    }
    const bool columns = w->column != 1 && F != 1;
    if ((columns && (scale || (w->row != 1 && D != 1))) || is_advised(w->address(stored))) return {};
    Product made{*w, x, bias, scale};
    made.y = empty(x, D);
    LinearCall& call = made.call;
    call.x = made.input.address, call.w = w->address(stored), call.bias = made.bias.address;
    call.y = made.y.mutable_data_ptr(), call.scales = (const float*)made.scales.address;
    call.T = T, call.D = D, call.F = F, call.stride = columns ? w->column : w->row;
    call.dtype = code_of(dtype), call.columns = columns, call.threads = threads();
    return made;
  }

 private:
  Matrix weight;
  Contiguous input, bias, scales;

  Product(const Matrix& w, const Tensor& x, const Maybe& b, const Tensor* scale)
      : weight(w), input(&x), bias(b), scales(scale) {}
};

std::optional<Tensor> product(const Tensor& x, const Tensor& weight, const Maybe& bias, const Tensor* scale = nullptr) {
  const auto made = Product::of(x, weight, bias, scale);
  return made && !run_linear(&made->call) ? std::optional<Tensor>(made->y) : std::nullopt;
}

// Those of one input; empty if not all of them can be made at once.
std::vector<Tensor> products(const Tensor& x, at::TensorList weights, const c10::List<Maybe>& biases) {
  const Tensor input = x.contiguous();
  std::vector<Product> made;
  std::vector<LinearCall> calls;
  std::vector<Tensor> y;
  if (weights.empty() || int64_t(weights.size()) > kLinears || biases.size() != weights.size()) return {};
  for (size_t i = 0; i < weights.size(); ++i) {
    auto one = Product::of(input, weights[i], biases.get(i));
    if (!one || one->call.columns) return {};
    calls.push_back(one->call), y.push_back(one->y), made.push_back(std::move(*one));
  }
  const LinearCalls some = {calls.data(), int64_t(calls.size()), calls[0].dtype};
  return run_linears(&some) ? std::vector<Tensor>() : y;
}

std::optional<Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask, double scale) {
  const auto dtype = q.scalar_type();
  if (code_of(dtype) < 0 || q.dim() != 4 || k.dim() != 4 || v.dim() != 4) return {};
  const int64_t B = q.size(0), H = q.size(1), K = k.size(1), L = k.size(2), D = q.size(3), V = v.size(3);
  if (!q.numel() || !k.numel() || !v.numel() || H % K || H > kSharingHeads * K) return {};
  if (!fits(q, dtype, {B, H, 1, D}) || !fits(k, dtype, {B, K, L, D}) || !fits(v, dtype, {B, K, L, V})) return {};
  if (q.stride(3) != 1 || k.stride(3) != 1 || v.stride(3) != 1) return {};
  const bool shown = mask && mask->scalar_type() == at::kBool;
  if (mask) {
    const auto kind = shown ? at::kBool : dtype;
    if (!fits(mask, kind, {B, 1, 1, L}) && !fits(mask, kind, {1, 1, 1, L})) return {};
    if (mask->stride(3) != 1) return {};
  }
  Tensor y = at::detail::empty_cpu({B, 1, H, V}, dtype);
  AttentionCall call = {};
  call.q = q.const_data_ptr(), call.k = k.const_data_ptr(), call.v = v.const_data_ptr(), call.y = y.mutable_data_ptr();
  if (mask) (shown ? call.shown : call.added) = mask->const_data_ptr();
  call.B = B, call.H = H, call.K = K, call.L = L, call.D = D, call.V = V;
  call.q_batch = q.stride(0), call.q_head = q.stride(1);
  call.k_batch = k.stride(0), call.k_head = k.stride(1), call.k_row = k.stride(2);
  call.v_batch = v.stride(0), call.v_head = v.stride(1), call.v_row = v.stride(2);
  call.mask_batch = mask && mask->size(0) == B ? mask->stride(0) : 0;
  call.dtype = code_of(dtype), call.threads = threads(), call.scale = float(scale);
  return run_attention(&call) ? std::optional<Tensor>() : y;
}

// The operator in Python, for what is not taken on.
template <class Function>
c10::TypedOperatorHandle<Function> in_python(const char* name, const char* overload = "inference") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Function>();
}

constexpr std::string_view kOwn = "cpp";  // the backend that this is

Tensor gated_mlp(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down, const Maybe& gate_bias,
                 const Maybe& up_bias, const Maybe& down_bias, const Maybe& q, const Maybe& bounds,
                 const Maybe& thresholds, at::OptionalIntArrayRef stamp, std::string_view activation, double threshold,
                 std::string_view backend) {
  std::optional<Tensor> y;
  if (backend == kOwn && !q)
    y = mlp(x, &gate, &up, down, gate_bias, up_bias, down_bias, thresholds, code_of(activation), threshold);
  if (y) return *y;
  return in_python<decltype(gated_mlp)>("hf_sparse::gated_mlp")
      .call(x, gate, up, down, gate_bias, up_bias, down_bias, q, bounds, thresholds, stamp, activation, threshold,
            backend);
}

Tensor plain_mlp(const Tensor& x, const Tensor& up, const Tensor& down, const Maybe& up_bias, const Maybe& down_bias,
                 const Maybe& q, const Maybe& bounds, const Maybe& thresholds, at::OptionalIntArrayRef stamp,
                 std::string_view activation, double threshold, std::string_view backend) {
  std::optional<Tensor> y;
  if (backend == kOwn && !q)
    y = mlp(x, &up, nullptr, down, up_bias, {}, down_bias, thresholds, code_of(activation), threshold);
  if (y) return *y;
  return in_python<decltype(plain_mlp)>("hf_sparse::plain_mlp")
      .call(x, up, down, up_bias, down_bias, q, bounds, thresholds, stamp, activation, threshold, backend);
}

Tensor sparse_linear(const Tensor& h, const Tensor& weight, const Maybe& bias, std::string_view backend) {
  std::optional<Tensor> y;
  if (backend == kOwn) y = mlp(h, nullptr, nullptr, weight, {}, {}, bias, {}, 0, 0.0);
  return y ? *y : in_python<decltype(sparse_linear)>("hf_sparse::sparse_linear").call(h, weight, bias, backend);
}

Tensor linear(const Tensor& x, const Tensor& weight, const Maybe& bias, std::string_view backend) {
  std::optional<Tensor> y;
  if (backend == kOwn) y = product(x, weight, bias);
  return y ? *y : in_python<decltype(linear)>("hf_sparse::linear").call(x, weight, bias, backend);
}

std::vector<Tensor> linears(const Tensor& x, at::TensorList weights, const c10::List<Maybe>& biases,
                            std::string_view backend) {
  std::vector<Tensor> y;
  if (backend == kOwn) y = products(x, weights, biases);
  for (size_t i = y.size(); i < weights.size(); ++i) y.push_back(linear(x, weights[i], biases.get(i), backend));
  return y;
}

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask, double scale) {
  const auto y = attention(q, k, v, mask, scale);
  return y ? *y : in_python<decltype(decode_attention)>("hf_sparse::decode_attention", "").call(q, k, v, mask, scale);
}

Tensor int8_mlp(const Tensor& x, const Tensor& first, const Tensor& first_scale, const Maybe& up, const Maybe& up_scale,
                const Tensor& down, const Tensor& down_scale, const Maybe& first_bias, const Maybe& up_bias,
                const Maybe& down_bias, const Maybe& thresholds, std::string_view activation, double threshold) {
  std::optional<Tensor> y;
  if (bool(up) == bool(up_scale)) {
    const Scales scales = {&first_scale, up ? &*up_scale : nullptr, &down_scale};
    y = mlp(x, &first, up ? &*up : nullptr, down, first_bias, up_bias, down_bias, thresholds, code_of(activation),
            threshold, scales);
  }
  if (y) return *y;
  return in_python<decltype(int8_mlp)>("hf_sparse::int8_mlp", "")
      .call(x, first, first_scale, up, up_scale, down, down_scale, first_bias, up_bias, down_bias, thresholds,
            activation, threshold);
}

Tensor int8_sparse_linear(const Tensor& h, const Tensor& rows, const Tensor& scale, const Maybe& bias) {
  const auto y = mlp(h, nullptr, nullptr, rows, {}, {}, bias, {}, 0, 0.0, {nullptr, nullptr, &scale});
  if (y) return *y;
  return in_python<decltype(int8_sparse_linear)>("hf_sparse::int8_sparse_linear", "").call(h, rows, scale, bias);
}

Tensor int8_linear(const Tensor& x, const Tensor& rows, const Tensor& scale, const Maybe& bias) {
  const auto y = product(x, rows, bias, &scale);
  return y ? *y : in_python<decltype(int8_linear)>("hf_sparse::int8_linear", "").call(x, rows, scale, bias);
}

TORCH_LIBRARY_IMPL(hf_sparse, CPU, library) {
  library.impl("gated_mlp.native", gated_mlp);
  library.impl("plain_mlp.native", plain_mlp);
  library.impl("sparse_linear.native", sparse_linear);
  library.impl("linear.native", linear);
  library.impl("linears.native", linears);
  library.impl("decode_attention.native", decode_attention);
  library.impl("int8_mlp.native", int8_mlp);
  library.impl("int8_sparse_linear.native", int8_sparse_linear);
  library.impl("int8_linear.native", int8_linear);
}

}  // namespace

// Before the first call of an operator. `in_child`: the process is one that has been forked already.
extern "C" void hfs_connect(decltype(run_mlp) mlp, decltype(run_linear) linear, decltype(run_linears) linears,
                            decltype(run_attention) attention, bool in_child) {
  run_mlp = mlp, run_linear = linear, run_linears = linears, run_attention = attention, forked |= in_child;
}

// From now on, in this thread, operators in Python are called for these weights; `addresses` are in ascending order.
extern "C" void hfs_advise(const int64_t* addresses, int64_t count) {
  advised.assign(addresses, addresses + count);
}

// What is done between the two no operator sees half done.
extern "C" void hfs_begin_change() {
  changing.lock();
  changes = true;
}

extern "C" void hfs_end_change() {
  if (changes) changing.unlock();
  changes = false;
}
