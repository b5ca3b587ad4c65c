#include "model/attention_layer.hpp"

#include <algorithm>
#include <cstring>

#include "kernels/kv_block/pack.hpp"

namespace tael {

AttentionWorkspace::AttentionWorkspace(const Limits& limits, int num_threads,
                                       const std::vector<AttentionPlan>& plans, bool unpacks, bool selects) {
  int64_t q_columns = 0, kv_columns = 0, shared = 0, states = 0, piece_q = 0;
  int head_dim = 0;
  for (const AttentionPlan& plan : plans) {
    const AttentionShape& shape = plan.shape();
    q_columns = std::max(q_columns, int64_t(shape.num_heads) * shape.head_dim);
    kv_columns = std::max(kv_columns, int64_t(shape.num_kv_heads) * shape.head_dim);
    head_dim = std::max(head_dim, shape.head_dim);
    states = std::max(states, plan.max_piece_rows() * attention_state_floats(shape.head_dim));
    piece_q = std::max(piece_q, plan.max_piece_rows() * shape.head_dim);
    shared = std::max(shared, plan.shared_floats());
  }
  q = Rows(limits.max_tokens, q_columns);
  next_q = Rows(selects ? kReplicatedTokens : 0, q_columns);
  out = Rows(limits.max_tokens, q_columns);
  k = Rows(limits.max_tokens, kv_columns);
  v = Rows(limits.max_tokens, kv_columns);
  shared_states = Buffer<float>(shared);
  const int64_t unpacked = unpacks ? kChunkBlocks * bf16_head_bytes(head_dim) / 2 : 0;
  const int64_t blocks = selects ? limits.max_model_len / kBlockTokens : 0, choosing_q = selects ? piece_q : 0;
  for (int t = 0; t < num_threads; ++t)
    scratch.push_back({Buffer<float>(2 * states),
                       Buffer<float>(head_dim),
                       Buffer<uint16_t>(unpacked),
                       Buffer<int32_t>(limits.max_model_len / kBlockTokens + 1),
                       {Buffer<uint16_t>(piece_q), BlockSelection(blocks, choosing_q)},
                       {Buffer<uint16_t>(choosing_q), BlockSelection(blocks, choosing_q)},
                       states});
}

int64_t AttentionWorkspace::bytes() const {
  int64_t bytes = q.bytes() + next_q.bytes() + k.bytes() + v.bytes() + out.bytes() + shared_states.bytes();
  for (const Scratch& s : scratch) {
    bytes += s.states.bytes() + s.head.bytes() + s.unpacked.bytes() + s.slots.bytes();
    for (const Queries* queries : {&s.own, &s.next}) bytes += queries->q.bytes() + queries->selection.bytes();
  }
  return bytes;
}

void AttentionLayer::attend(const Step& step, const LinearInput& x, const RopeTable& rope, AttentionPlan& plan,
                            AttentionWorkspace& ws, const Forecast* next) const {
  linear(step.pool, step.thread, step.kernels, x,
         {{&weights_.q, ws.q.row(0), ws.q.columns()},
          {&weights_.k, ws.k.row(0), ws.k.columns()},
          {&weights_.v, ws.v.row(0), ws.v.columns()}});
  const std::vector<Superblocks::Missing>& missing = superblocks_->missing();
  if (!missing.empty()) next = nullptr;  // the next layer's rows of these would be read before they are filled
  if (next)
    linear(step.pool, step.thread, step.kernels, next->x,
           {{&next->layer->weights_.q, ws.next_q.row(0), ws.next_q.columns()}});
  // In a decode step a piece appends the keys and values that it is the first to read.
  if (!step.batch.is_decode()) {
    const int num_kv_heads = config_.shape.num_kv_heads;
    step.pool.parallel_for(step.thread, int64_t(plan.spans().size()) * num_kv_heads, [&](int64_t item) {
      const BlockSpan& span = plan.spans()[item / num_kv_heads];
      for (int64_t token = span.first_token; token < span.first_token + span.num_tokens; ++token)
        append(step, rope, ws, token, int(item % num_kv_heads));
    });
  }
  if (config_.key_summaries && !missing.empty()) {
    const int num_kv_heads = config_.shape.num_kv_heads;
    const KVPool rows = superblocks_->pool(config_.first_head);
    step.pool.parallel_for(step.thread, int64_t(missing.size()) * num_kv_heads, [&](int64_t item) {
      const Superblocks::Missing& superblock = missing[item / num_kv_heads];
      const int kv_head = int(item % num_kv_heads);
      merge_bounds(superblock.blocks, kSuperblockBlocks, summaries_.head(0, kv_head), summaries_.block_bytes,
                   config_.shape.head_dim, (uint16_t*)rows.head(superblock.row, kv_head));
    });
  }
  step.pool.parallel_for(step.thread, int64_t(plan.pieces().size()),
                         [&](int64_t i) { run_piece(step, rope, plan, ws, plan.pieces()[i], next); });
}

namespace {

constexpr int kPartitionBlocks = kPartitionTokens / kBlockTokens;

// Walks partitions of a task in order. The blocks of a tiered pool are brought into memory a few partitions
// ahead of the one that is computed: those of the first are on their way from the start.
class PartitionWalk {
 public:
  PartitionWalk(const Kernels& kernels, const AttentionTask& task, TieredPool* tiered, int first_head,
                int first_partition, int last_partition, int32_t* slots)
      : kernels_(kernels), task_(task), tiered_(tiered), head_(first_head + task.kv_head), first_(first_partition),
        last_(last_partition), blocks_(task.block_table), slots_(slots), num_begun_(first_partition) {
    if (!tiered_) return;
    task_.block_table = slots;
    task_.kv_head = 0;  // of a slot
    begin_until(first_ + kAhead);
  }

  // All partitions merged, into the first of two sets of states.
  void run(float* states, int64_t state_floats) {
    float *total = states, *next = total + state_floats;
    run_partition(first_, total);
    for (int p = first_ + 1; p < last_; ++p) {
      run_partition(p, next);
      kernels_.attention_merge(total, next, task_.num_rows(), task_.head_dim);
    }
  }

 private:
  static constexpr int kAhead = 5;  // so many in all
  static_assert(kAhead * kPartitionBlocks <= TieredPool::kMaxPinned);

  void run_partition(int partition, float* states) {
    if (!tiered_) {
      kernels_.attention_partition(task_, partition, states);
      return;
    }
    begin_until(partition + kAhead);
    const int num_blocks = count(partition, partition + 1);
    tiered_->wait(slots_ + begin(partition), num_blocks);
    kernels_.attention_partition(task_, partition, states);
    tiered_->unpin(slots_ + begin(partition), num_blocks);
  }
  // With one request for all of them: each costs a call of the kernel.
  void begin_until(int partition) {
    const int last = std::min(partition, last_);
    if (num_begun_ >= last) return;
    const int first = begin(num_begun_);
    tiered_->pin(head_, blocks_ + first, count(num_begun_, last), slots_ + first);
    num_begun_ = last;
  }

  // Complete blocks of partitions.
  static int begin(int partition) { return partition * kPartitionBlocks; }
  int count(int first, int last) const {
    return std::clamp(task_.first_position / kBlockTokens - begin(first), 0, begin(last) - begin(first));
  }

  const Kernels& kernels_;
  AttentionTask task_;
  TieredPool* const tiered_;
  const int head_, first_, last_;
  const int32_t* const blocks_;
  int32_t* const slots_;
  int num_begun_;
};

// The queries of every kChooserStep-th token of a task.
AttentionTask choosers_of(const AttentionTask& task, uint16_t* queries) {
  const int64_t size = int64_t(task.num_heads) * task.head_dim;
  AttentionTask choosers = task;
  choosers.q = queries;
  choosers.num_tokens = 0;
  for (int token = 0; token < task.num_tokens; token += kChooserStep, ++choosers.num_tokens)
    queries = std::copy_n(task.q + token * size, size, queries);
  return choosers;
}

}  // namespace

// The task of tokens that choose together, over `budget` blocks: as if the sequence had no others. These are the sinks,
// the recent ones, and the best of those between; of superblocks and of blocks with equal scores the earliest.
AttentionTask AttentionLayer::select(const Step& step, const AttentionTask& task, int32_t seq, int budget,
                                     BlockSelection& selection) const {
  const int first = kSinkBlocks, last = task.first_position / kBlockTokens - kRecentBlocks;
  const int num_scored = budget - kMinBudgetBlocks;
  int32_t* end = std::copy_n(task.block_table, first, selection.chosen.data());
  if (num_scored > 0) {
    const AttentionTask choosers = choosers_of(task, selection.queries.data());
    AttentionTask candidates = choosers;
    candidates.block_table = selection.candidates.data();
    const uint8_t* const summaries = summaries_.head(0, task.kv_head);
    int num_candidates = find_candidates(step, choosers, seq, budget, first, last, selection);
    if (num_candidates > kCandidates * num_scored) {
      step.kernels.score_bounds(candidates, summaries, summaries_.block_bytes, num_candidates, selection.scores.data());
      selection.keep_best(num_candidates, kCandidates * num_scored);
      num_candidates = kCandidates * num_scored;
    }
    step.kernels.score_codes(candidates, summaries, summaries_.block_bytes, num_candidates, selection.scores.data());
    selection.keep_best(num_candidates, num_scored);
    end = std::copy_n(selection.candidates.data(), num_scored, end);
  }
  end = std::copy_n(task.block_table + last, kRecentBlocks, end);
  AttentionTask chosen = task;
  chosen.block_table = selection.chosen.data();
  chosen.first_position = int(end - chosen.block_table) * kBlockTokens + task.first_position % kBlockTokens;
  return chosen;
}

// Of the blocks from `first` to `last` - 1, those of the best superblocks and those in none yet. Returns their number.
int AttentionLayer::find_candidates(const Step& step, const AttentionTask& task, int32_t seq, int budget, int first,
                                    int last, BlockSelection& selection) const {
  int32_t* end = selection.candidates.data();
  const auto add = [&](int from, int to) {
    from = std::max(from, first);
    to = std::min(to, last);
    if (from < to) end = std::copy(task.block_table + from, task.block_table + to, end);
  };
  const int num_superblocks = (last + kRecentBlocks) / kSuperblockBlocks, most = num_scored_superblocks(budget);
  if (num_superblocks <= most) {
    add(first, last);
  } else {
    AttentionTask superblocks = task;
    superblocks.block_table = superblocks_->rows(seq);
    const KVPool rows = superblocks_->pool(config_.first_head);
    step.kernels.score_bounds(superblocks, rows.head(0, task.kv_head), rows.block_bytes, num_superblocks,
                              selection.scores.data());
    selection.find_best(num_superblocks, most);
    for (int i = 0; i < most; ++i) {
      const int block = int(selection.best.data()[i]) * kSuperblockBlocks;
      add(block, block + kSuperblockBlocks);
    }
    add(num_superblocks * kSuperblockBlocks, last);
  }
  return int(end - selection.candidates.data());
}

// The task of a piece, with its queries in room for them.
AttentionTask AttentionLayer::task_of(const Step& step, const RopeTable& rope, const AttentionWorkspace& ws,
                                      const Rows& q, const AttentionPiece& piece,
                                      AttentionWorkspace::Queries& queries) const {
  constexpr float kLog2E = 1.44269504088896341f;
  const AttentionShape& shape = config_.shape;
  const AttentionWorkspace::Scratch& scratch = ws.scratch[step.thread];
  const int heads = shape.heads_per_kv_head();
  float* head = scratch.head.data();
  uint16_t* out = queries.q.data();
  for (int64_t token = piece.first_token; token < piece.first_token + piece.num_tokens; ++token)
    for (int64_t h = piece.kv_head * heads; h < (piece.kv_head + 1) * heads; ++h, out += shape.head_dim) {
      memcpy(head, q.row(token) + h * shape.head_dim, shape.head_dim * sizeof(float));
      if (weights_.q_bias) step.kernels.add(head, weights_.q_bias.data() + h * shape.head_dim, shape.head_dim);
      if (weights_.q_norm)
        step.kernels.rms_norm(head, weights_.q_norm.data(), shape.head_dim, config_.norm_eps, head);
      step.kernels.rope(head, rope.cos_of(token), rope.sin_of(token), rope.num_pairs());
      step.kernels.to_bf16(head, config_.scale * kLog2E, shape.head_dim, out);
    }
  const int32_t first_position = step.batch.positions[piece.first_token];
  return {
      .complete = &complete_,
      .format = config_.kv_format,
      .block_table = step.batch.block_tables[config_.cache_group].row(piece.seq),
      .open = open_keys(step.batch, piece.seq, first_position / kBlockTokens, piece.kv_head),
      .unpacked = scratch.unpacked.data(),
      .kv_head = piece.kv_head,
      .num_heads = heads,
      .head_dim = shape.head_dim,
      .num_tokens = piece.num_tokens,
      .first_position = first_position,
      .window = shape.window,
      .q = queries.q.data(),
  };
}

// What the guessed queries of a decode step would read.
void AttentionLayer::prefetch(const Step& step, const RopeTable& rope, AttentionWorkspace& ws, int32_t seq,
                              int32_t kv_head) const {
  const int32_t token = step.batch.query_start[seq];
  if (step.batch.kv_budgets[token] == 0) return;
  const int32_t budget = budget_of_layer(step.batch.kv_budgets[token], config_.shape.budget_percent);
  if (step.batch.positions[token] / kBlockTokens < budget) return;
  AttentionWorkspace::Queries& queries = ws.scratch[step.thread].next;
  const AttentionTask task =
      task_of(step, rope, ws, ws.next_q, {seq, kv_head, token, 1, 0, 0, -1, budget}, queries);
  const AttentionTask chosen = select(step, task, seq, budget, queries.selection);
  tiered_->prefetch(config_.first_head + kv_head, chosen.block_table, chosen.first_position / kBlockTokens);
}

void AttentionLayer::run_piece(const Step& step, const RopeTable& rope, AttentionPlan& plan, AttentionWorkspace& ws,
                               const AttentionPiece& piece, const Forecast* next) const {
  AttentionWorkspace::Scratch& scratch = ws.scratch[step.thread];
  const int32_t position = step.batch.positions[piece.first_token];
  const bool is_newest = step.batch.is_decode() && position / kPartitionTokens == piece.last_partition - 1;
  if (is_newest) append(step, rope, ws, piece.first_token, piece.kv_head);
  AttentionTask task = task_of(step, rope, ws, ws.q, piece, scratch.own);
  int last_partition = piece.last_partition;
  if (piece.budget > 0) {
    task = select(step, task, piece.seq, piece.budget, scratch.own.selection);
    last_partition = task.first_position / kPartitionTokens + 1;
  }
  PartitionWalk walk(step.kernels, task, tiered_, config_.first_head, piece.first_partition, last_partition,
                     scratch.slots.data());
  // While this layer's blocks are on their way: asked for before them, the next layer's would delay them.
  if (is_newest && next)
    for (int32_t h = piece.kv_head; h < next->layer->config_.shape.num_kv_heads; h += config_.shape.num_kv_heads)
      next->layer->prefetch(step, *next->rope, ws, piece.seq, h);
  if (piece.merge < 0) {
    walk.run(scratch.states.data(), scratch.state_floats);
    finish(piece, task, step, ws, scratch.states.data());
    return;
  }
  const int64_t floats = task.num_rows() * attention_state_floats(task.head_dim);
  AttentionMerge& merge = plan.merge(piece.merge);
  float* total = ws.shared_states.data() + merge.states;
  walk.run(total + (piece.first_partition - merge.first_partition) * floats, 0);
  // The last to finish merges.
  if (merge.num_finished.fetch_add(1, std::memory_order_acq_rel) + 1 < merge.num_partitions) return;
  merge.num_finished.store(0, std::memory_order_relaxed);
  for (int p = 1; p < merge.num_partitions; ++p)
    step.kernels.attention_merge(total, total + p * floats, task.num_rows(), task.head_dim);
  finish(piece, task, step, ws, total);
}

void AttentionLayer::finish(const AttentionPiece& piece, const AttentionTask& task, const Step& step,
                            const AttentionWorkspace& ws, const float* states) const {
  const int head_dim = config_.shape.head_dim;
  for (int r = 0; r < task.num_rows(); ++r) {
    const int64_t head = int64_t(piece.kv_head) * task.num_heads + r % task.num_heads;
    step.kernels.attention_finish(states + r * attention_state_floats(head_dim), head_dim,
                                  ws.out.row(piece.first_token + r / task.num_heads) + head * head_dim);
  }
}

// K of one head, and V after it, of a block whose tokens are being computed.
uint16_t* AttentionLayer::open_keys(const Batch& batch, int32_t seq, int32_t block, int kv_head) const {
  if (!open_.data) return (uint16_t*)complete_.head(batch.block_tables[config_.cache_group].row(seq)[block], kv_head);
  const int32_t first = batch.positions[batch.query_start[seq]] / kBlockTokens;
  return (uint16_t*)open_.head(batch.open_tables[config_.cache_group].row(seq)[block - first], kv_head);
}

// Stores one head of a block that has got its last token as later blocks will see it.
void AttentionLayer::complete_block(const Step& step, int32_t seq, int32_t block, int kv_head) const {
  const int32_t own = step.batch.block_tables[config_.cache_group].row(seq)[block];
  const uint16_t* open = open_keys(step.batch, seq, block, kv_head);
  const int head_dim = config_.shape.head_dim;
  if (config_.key_summaries) summarize_keys(open, head_dim, summaries_.head(own, kv_head));
  if (!open_.data) return;
  const int32_t place = tiered_ ? tiered_->begin_store(config_.first_head + kv_head, own) : own;
  pack_head(config_.kv_format, open, head_dim, complete_head(place, kv_head));
  if (tiered_) tiered_->end_store(place);
}

// Stores the key and the value of one token and KV head.
void AttentionLayer::append(const Step& step, const RopeTable& rope, const AttentionWorkspace& ws, int64_t token,
                            int kv_head) const {
  const Kernels& kernels = step.kernels;
  const Batch& batch = step.batch;
  const AttentionWorkspace::Scratch& scratch = ws.scratch[step.thread];
  const int head_dim = config_.shape.head_dim;
  const int32_t seq = batch.token_seq[token], position = batch.positions[token];
  uint16_t* const open = open_keys(batch, seq, position / kBlockTokens, kv_head);
  const int slot = position % kBlockTokens;
  float* head = scratch.head.data();
  uint16_t* rounded = scratch.own.q.data();

  memcpy(head, ws.k.row(token) + kv_head * head_dim, head_dim * sizeof(float));
  if (weights_.k_bias) kernels.add(head, weights_.k_bias.data() + kv_head * head_dim, head_dim);
  if (weights_.k_norm) kernels.rms_norm(head, weights_.k_norm.data(), head_dim, config_.norm_eps, head);
  kernels.rope(head, rope.cos_of(token), rope.sin_of(token), rope.num_pairs());
  kernels.to_bf16(head, 1.0f, head_dim, rounded);
  uint16_t* keys = open + int64_t(slot / 16) * head_dim * 16 + slot % 16 * 2;
  for (int d = 0; d < head_dim; d += 2) memcpy(keys + d * 16, rounded + d, 4);

  memcpy(head, ws.v.row(token) + kv_head * head_dim, head_dim * sizeof(float));
  if (weights_.v_bias) kernels.add(head, weights_.v_bias.data() + kv_head * head_dim, head_dim);
  kernels.to_bf16(head, 1.0f, head_dim, rounded);
  uint16_t* values = open + int64_t(kBlockTokens) * head_dim + int64_t(slot / 2) * head_dim * 2 + slot % 2;
  for (int d = 0; d < head_dim; ++d) values[d * 2] = rounded[d];
  // Values are read in pairs: where no token follows yet, a block's earlier owner may have left NaN.
  if (slot % 2 == 0 && token + 1 == batch.query_start[seq + 1])
    for (int d = 0; d < head_dim; ++d) values[d * 2 + 1] = 0;
  if (slot == kBlockTokens - 1) complete_block(step, seq, position / kBlockTokens, kv_head);
}

}  // namespace tael
