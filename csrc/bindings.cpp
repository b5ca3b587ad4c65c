// The Python module tael._native.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <climits>
#include <stdexcept>

#include "kernels/dispatch.hpp"
#include "limits/limits.hpp"
#include "model/model.hpp"
#include "quant/dequantize.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace tael {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bytes2D = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Pool = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Room = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2D = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints2D = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bools = nb::ndarray<const bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatArray2D = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

Format format_named(const std::string& name) {
  for (int i = 0; i < kNumFormats; ++i)
    if (name == kFormats[i].name) return Format(i);
  throw std::invalid_argument("unknown weight format " + name);
}

KVFormat kv_format_named(const std::string& name) {
  for (int i = 0; i < kNumKVFormats; ++i)
    if (name == kKVFormatNames[i]) return KVFormat(i);
  throw std::invalid_argument("unknown KV format " + name);
}

// A Matrix that keeps its bytes alive.
struct MatrixHandle {
  Matrix matrix;
  Bytes bytes;

  MatrixHandle(const std::string& format, int64_t rows, int64_t columns, Bytes tiles) : bytes(tiles) {
    matrix = {format_named(format), rows, columns, tiles.data()};
    if (int64_t(tiles.size()) != num_tiles(rows) * matrix.tile_stride())
      throw std::invalid_argument("matrix of " + format + ": wrong number of bytes");
  }
};

FloatArray2D new_array(int64_t rows, int64_t columns) {
  float* data = new float[rows * columns]();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return FloatArray2D(data, {size_t(rows), size_t(columns)}, owner);
}

Vector padded_vector(const std::optional<Floats>& array) {
  Vector v;
  if (!array) return v;
  v.values.assign(padded_columns(int64_t(array->size())), 0.0f);
  std::copy(array->data(), array->data() + array->size(), v.values.begin());
  return v;
}

// x W^T with a freshly allocated result: for tests of the kernels.
FloatArray2D matmul_rows(const MatrixHandle& w, Floats2D x, const std::string& isa, int num_threads) {
  const Kernels& kernels = kernels_for(isa);
  const int64_t tokens = int64_t(x.shape(0)), columns = w.matrix.columns;
  if (int64_t(x.shape(1)) != columns) throw std::invalid_argument("columns differ");
  const Rows rows(tokens, columns);
  const QuantizedBuffer quantized(tokens, columns);
  const LinearInput input = {rows.floats(tokens), quantized.rows(kernels, tokens, columns)};
  for (int64_t t = 0; t < tokens; ++t) {
    std::copy(x.data() + t * columns, x.data() + (t + 1) * columns, rows.row(t));
    kernels.quantize(rows.row(t), 0, input.quantized.num_groups, input.quantized, t);
  }
  const int64_t stride = w.matrix.padded_rows();
  const Buffer<float> out(tokens * stride);
  ThreadPool pool(num_threads);
  pool.run([&](int thread) { linear(pool, thread, kernels, input, {{&w.matrix, out.data(), stride}}); });
  FloatArray2D result = new_array(tokens, w.matrix.rows);
  for (int64_t t = 0; t < tokens; ++t)
    std::copy(out.data() + t * stride, out.data() + t * stride + w.matrix.rows, result.data() + t * w.matrix.rows);
  return result;
}

// Seconds that x W^T takes for several matrices of one shape, one after the other, the rounding of
// x to int8 for each included: the mean over passes that take `min_seconds`, after as long a warm-up. In
// the first milliseconds new threads still share a core.
double time_matmul(const std::vector<const MatrixHandle*>& matrices, Floats2D x, const std::string& isa,
                   int num_threads, double min_seconds) {
  const Kernels& kernels = kernels_for(isa);
  const Matrix& shape = matrices.at(0)->matrix;
  const int64_t tokens = int64_t(x.shape(0)), columns = shape.columns, stride = shape.padded_rows();
  if (int64_t(x.shape(1)) != columns) throw std::invalid_argument("columns differ");
  for (const MatrixHandle* w : matrices)
    if (w->matrix.rows != shape.rows || w->matrix.columns != columns) throw std::invalid_argument("shapes differ");
  const Rows rows(tokens, columns);
  const QuantizedBuffer quantized(tokens, columns);
  const LinearInput input = {rows.floats(tokens), quantized.rows(kernels, tokens, columns)};
  for (int64_t t = 0; t < tokens; ++t) std::copy_n(x.data() + t * columns, columns, rows.row(t));
  const Buffer<float> out(tokens * stride);
  ThreadPool pool(num_threads);
  const auto seconds_of_a_pass = [&] {
    double seconds = 0;
    int64_t passes = 0;
    for (const auto start = std::chrono::steady_clock::now(); seconds < min_seconds; ++passes) {
      pool.run([&](int thread) {
        for (const MatrixHandle* w : matrices) {
          pool.parallel_for(thread, tokens, [&](int64_t t) {
            kernels.quantize(rows.row(t), 0, input.quantized.num_groups, input.quantized, t);
          });
          linear(pool, thread, kernels, input, {{&w->matrix, out.data(), stride}});
        }
      });
      seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    return seconds / double(passes);
  };
  seconds_of_a_pass();
  return seconds_of_a_pass();
}

// Model plus the Python objects whose memory it reads.
struct ModelHandle {
  Model model;
  std::vector<nb::object> keep;

  ModelHandle(const std::string& isa, int num_threads, const ModelConfig& config)
      : model(isa, num_threads, config) {}

  const Matrix& hold(nb::handle matrix) {
    keep.push_back(nb::borrow(matrix));
    return nb::cast<MatrixHandle&>(matrix).matrix;
  }

  void add_layer(const nb::dict& attention, const nb::dict& ffn, const nb::dict& norms) {
    const auto matrix = [&](const nb::dict& d, const char* key) { return hold(d[key]); };
    const auto vector = [](const nb::dict& d, const char* key) {
      return padded_vector(nb::cast<std::optional<Floats>>(d[key]));
    };
    const auto number = [&](const char* key) { return nb::cast<int>(attention[key]); };
    const nb::object window = attention["window"];
    AttentionConfig config{
        .shape = {number("num_heads"), number("num_kv_heads"), number("head_dim"),
                  window.is_none() ? INT_MAX : nb::cast<int>(window), number("budget_percent")},
        .scale = nb::cast<float>(attention["scale"]),
        .norm_eps = model.config().norm_eps,
        .rope = number("rope"),
        .plan = -1,
        .cache_group = number("cache_group"),
        .kv_format = kv_format_named(nb::cast<std::string>(attention["kv_format"])),
        .key_summaries = nb::cast<bool>(attention["key_summaries"]),
        .layer_offset = nb::cast<int64_t>(attention["layer_offset"]),
        .open_layer_offset = nb::cast<int64_t>(attention["open_layer_offset"]),
        .first_head = number("first_head"),
    };
    AttentionWeights weights{
        matrix(attention, "q"), matrix(attention, "k"), matrix(attention, "v"), matrix(attention, "o"),
        vector(attention, "q_bias"), vector(attention, "k_bias"), vector(attention, "v_bias"),
        vector(attention, "o_bias"), vector(attention, "q_norm"), vector(attention, "k_norm")};
    const Activation activation =
        nb::cast<std::string>(ffn["activation"]) == "silu" ? Activation::SiLU : Activation::GeluTanh;
    model.add_layer(config, std::move(weights),
                    DenseLayer(activation, {matrix(ffn, "gate"), matrix(ffn, "up"), matrix(ffn, "down")}),
                    {vector(norms, "mixer"), vector(norms, "mixer_post"), vector(norms, "ffn"),
                     vector(norms, "ffn_post")});
  }

  BlockPool hold(const Pool& array) {
    keep.push_back(nb::cast(array));
    return {array.data(), int64_t(array.shape(0)), int64_t(array.shape(1))};
  }

  BlockPool hold(const std::optional<Pool>& array) { return array ? hold(*array) : BlockPool{}; }

  void bind_kv(int group, Pool blocks, std::optional<Pool> open, std::optional<Pool> summaries) {
    model.bind_kv(group, hold(blocks), hold(open), hold(summaries));
  }

  void bind_tiered_kv(int group, nb::object tiered, Pool open, std::optional<Pool> summaries);
};

// TieredPool plus the slots that it moves.
struct TieredPoolHandle {
  Pool slots;
  TieredPool pool;
  TieredPoolHandle(int fd, int64_t num_blocks, int heads_per_block, Pool slots)
      : slots(slots),
        pool(fd, num_blocks, heads_per_block, slots.data(), int64_t(slots.shape(0)), int64_t(slots.shape(1))) {}

  template <class Array> void check(int32_t block, const Array& payload) const {
    if (block < 0 || block >= pool.num_blocks() || int64_t(payload.size()) != pool.heads_per_block() * pool.slot_bytes())
      throw std::out_of_range("block or payload of a tiered pool");
  }
};

void ModelHandle::bind_tiered_kv(int group, nb::object tiered, Pool open, std::optional<Pool> summaries) {
  keep.push_back(tiered);
  model.bind_kv(group, &nb::cast<TieredPoolHandle&>(tiered).pool, hold(open), hold(summaries));
}

// A view of what belongs to the model: [rows, columns] or [rows].
template <class T> auto view(nb::handle self, const Buffer<T>& buffer, int64_t rows, int64_t columns, int64_t stride) {
  const size_t shape[2] = {size_t(rows), size_t(columns)};
  const int64_t strides[2] = {stride, 1};
  return nb::ndarray<nb::numpy, T, nb::ndim<2>>(buffer.data(), 2, shape, self, strides);
}
template <class T> auto view(nb::handle self, const Buffer<T>& buffer, int64_t rows) {
  return nb::ndarray<nb::numpy, T, nb::ndim<1>>(buffer.data(), {size_t(rows)}, self);
}

nb::tuple forward(nb::handle_t<ModelHandle> self, Ints token_ids, Ints positions, Ints query_start,
                  const std::vector<Ints2D>& block_tables, const std::vector<Ints2D>& open_tables,
                  Ints logits_indices, Floats temperatures, Bools full_logits, std::optional<Ints> kv_budgets,
                  std::vector<std::vector<int32_t>> restored_blocks) {
  Model& model = nb::cast<ModelHandle&>(self).model;
  Batch batch{};
  batch.num_tokens = int64_t(token_ids.size());
  batch.num_seqs = int64_t(query_start.size()) - 1;
  batch.num_logits = int64_t(logits_indices.size());
  if (positions.size() != token_ids.size()) throw std::invalid_argument("one position a token");
  if (temperatures.size() != logits_indices.size() || full_logits.size() != logits_indices.size())
    throw std::invalid_argument("one temperature and one choice a row of logits");
  batch.token_ids = token_ids.data();
  batch.positions = positions.data();
  batch.query_start = query_start.data();
  batch.logits_indices = logits_indices.data();
  batch.temperatures = temperatures.data();
  batch.full_logits = full_logits.data();
  if (kv_budgets && kv_budgets->size() != token_ids.size()) throw std::invalid_argument("one KV budget a token");
  batch.kv_budgets = kv_budgets ? kv_budgets->data() : nullptr;
  batch.restored_blocks = std::move(restored_blocks);
  if (batch.restored_blocks.empty()) batch.restored_blocks.resize(model.num_cache_groups());
  const auto tables = [&](const std::vector<Ints2D>& arrays, std::vector<Batch::BlockTable>& out) {
    for (const Ints2D& table : arrays) {
      if (int64_t(table.shape(0)) != batch.num_seqs) throw std::invalid_argument("one block table row a sequence");
      out.push_back({table.data(), int64_t(table.shape(1))});
    }
  };
  tables(block_tables, batch.block_tables);
  tables(open_tables, batch.open_tables);
  const HeadOutput* out;
  {
    nb::gil_scoped_release release;
    out = &model.forward(std::move(batch));
  }
  const int64_t rows = int64_t(logits_indices.size()), k = model.lm_head().num_candidates();
  return nb::make_tuple(
      view(self, out->top_token_ids, rows, k, k), view(self, out->top_logits, rows, k, k),
      view(self, out->sum_exp, rows), view(self, out->sum_exp_at_temperature, rows),
      view(self, out->logits, rows, model.config().vocab_size, model.lm_head().logits_stride()));
}

}  // namespace
}  // namespace tael

NB_MODULE(_native, m) {
  using namespace tael;
  m.attr("BLOCK_TOKENS") = kBlockTokens;
  m.attr("MAX_HEAD_DIM") = kMaxHeadDim;
  m.attr("MIN_BUDGET_BLOCKS") = kMinBudgetBlocks;
  m.attr("SUPERBLOCK_BLOCKS") = kSuperblockBlocks;
  m.attr("MIN_SCORED_SUPERBLOCKS") = num_scored_superblocks(0);
#if defined(__clang__)
  m.attr("COMPILER") = __VERSION__;
#else
  m.attr("COMPILER") = "GCC " __VERSION__;
#endif
  m.def("supported_isas", &supported_isas);
  m.def("num_tiles", &num_tiles, "rows"_a);
  m.def("tile_bytes", [](const std::string& format, int64_t columns) {
    return tile_bytes(format_named(format), columns);
  }, "format"_a, "columns"_a);
  m.def("repack", [](const std::string& format, Bytes2D rows, int64_t columns,
                     Room tiles) {
    const Format f = format_named(format);
    const FormatInfo& info = kFormats[int(f)];
    const int64_t num_rows = int64_t(rows.shape(0));
    if (columns % info.block_columns || int64_t(rows.shape(1)) != columns / info.block_columns * info.block_bytes ||
        int64_t(tiles.size()) != num_tiles(num_rows) * tile_bytes(f, columns))
      throw std::invalid_argument("repack: sizes disagree");
    nb::gil_scoped_release release;
    repack(f, rows.data(), num_rows, columns, tiles.data());
  }, "format"_a, "rows"_a, "columns"_a, "tiles"_a.noconvert());
  m.def("dequantize_row", [](const MatrixHandle& w, int64_t row) {
    if (row < 0 || row >= w.matrix.rows) throw std::out_of_range("row");
    FloatArray2D out = new_array(1, w.matrix.columns);
    dequantize_row(w.matrix.format, w.matrix.tile(row / kTileRows), int(row % kTileRows), w.matrix.columns, out.data());
    return out;
  }, "matrix"_a, "row"_a);
  m.def("matmul", &matmul_rows, "matrix"_a, "x"_a, "isa"_a, "num_threads"_a);
  m.def("time_matmul", &time_matmul, "matrices"_a, "x"_a, "isa"_a, "num_threads"_a, "min_seconds"_a);
  m.def("read_bytes_per_s", &read_bytes_per_s, "num_threads"_a, "num_bytes"_a,
        nb::call_guard<nb::gil_scoped_release>());
  m.def("int8_ops_per_s", &int8_ops_per_s, "num_threads"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("bf16_flops_per_s", &bf16_flops_per_s, "num_threads"_a, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<MatrixHandle>(m, "Matrix")
      .def(nb::init<const std::string&, int64_t, int64_t, Bytes>(), "format"_a, "rows"_a, "columns"_a, "tiles"_a);

  nb::exception<LostBlocks>(m, "LostBlocks");
  m.attr("SLOT_ALIGNMENT") = TieredPool::kAlignment;
  m.def("min_slots", &TieredPool::min_slots, "num_threads"_a);
  nb::class_<TieredPoolHandle>(m, "TieredPool")
      .def(nb::init<int, int64_t, int, Pool>(), "fd"_a, "num_blocks"_a, "heads_per_block"_a, "slots"_a.noconvert())
      .def("read_block", [](TieredPoolHandle& self, int32_t block, Room out) {
        self.check(block, out);
        nb::gil_scoped_release release;
        self.pool.read_block(block, out.data());
      }, "block"_a, "out"_a.noconvert())
      .def("write_block", [](TieredPoolHandle& self, int32_t block, Bytes payload) {
        self.check(block, payload);
        nb::gil_scoped_release release;
        self.pool.write_block(block, payload.data());
      }, "block"_a, "payload"_a)
      .def("take_lost", [](TieredPoolHandle& self) {
        const TieredPool::Lost lost = self.pool.take_lost();
        return nb::make_tuple(lost.blocks, lost.reason);
      })
      .def_prop_ro("num_bytes", [](const TieredPoolHandle& self) { return self.pool.bytes(); })
      .def_prop_ro("counters", [](TieredPoolHandle& self) {
        const TieredPool::Counters c = self.pool.counters();
        nb::dict out;
        out["num_hits"] = c.num_hits;
        out["num_loads"] = c.num_loads;
        out["num_prefetches"] = c.num_prefetches;
        out["num_stores"] = c.num_stores;
        out["num_errors"] = c.num_errors;
        return out;
      });

  nb::class_<ModelHandle>(m, "Model")
      .def("__init__", [](ModelHandle* self, const std::string& isa, int num_threads, int64_t hidden_size,
                          int64_t vocab_size, float norm_eps, float embedding_scale) {
        new (self) ModelHandle(isa, num_threads, {hidden_size, vocab_size, norm_eps, embedding_scale});
      }, "isa"_a, "num_threads"_a, "hidden_size"_a, "vocab_size"_a, "norm_eps"_a, "embedding_scale"_a)
      .def("add_rope", [](ModelHandle& self, std::vector<float> inv_freq, float attention_factor) {
        return self.model.add_rope(std::move(inv_freq), attention_factor);
      }, "inv_freq"_a, "attention_factor"_a)
      .def("set_ends", [](ModelHandle& self, nb::object embedding, nb::object lm_head, Floats norm) {
        self.model.set_ends(self.hold(embedding), self.hold(lm_head), padded_vector(norm));
      }, "embedding"_a, "lm_head"_a, "norm"_a)
      .def("add_layer", &ModelHandle::add_layer, "attention"_a, "ffn"_a, "norms"_a)
      .def("allocate", [](ModelHandle& self, int64_t max_tokens, int64_t max_seqs, int64_t max_logits,
                          int64_t max_model_len, int64_t num_candidates) {
        self.model.allocate({max_tokens, max_seqs, max_logits, max_model_len, num_candidates});
      }, "max_tokens"_a, "max_seqs"_a, "max_logits"_a, "max_model_len"_a, "num_candidates"_a)
      .def("bind_kv", &ModelHandle::bind_kv, "cache_group"_a, "blocks"_a.noconvert(),
           "open_blocks"_a.noconvert() = nb::none(), "summaries"_a.noconvert() = nb::none())
      .def("bind_tiered_kv", &ModelHandle::bind_tiered_kv, "cache_group"_a, "tiered"_a, "open_blocks"_a.noconvert(),
           "summaries"_a.noconvert() = nb::none())
      .def_prop_ro("workspace_bytes", [](const ModelHandle& self) { return self.model.workspace_bytes(); })
      .def_prop_ro("superblock_bytes", [](const ModelHandle& self) { return self.model.superblock_bytes(); })
      .def("forward", &forward, "token_ids"_a, "positions"_a, "query_start"_a, "block_tables"_a, "open_tables"_a,
           "logits_indices"_a, "temperatures"_a, "full_logits"_a, "kv_budgets"_a = nb::none(),
           "restored_blocks"_a = nb::make_tuple())
      .def("draw", [](const ModelHandle& self, int64_t row, double uniform) {
        const Candidate drawn = self.model.draw(row, uniform);
        return nb::make_tuple(drawn.token_id, drawn.logit);
      }, "row"_a, "uniform"_a);
}
