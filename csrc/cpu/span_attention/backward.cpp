// Span attention, backward. With S = scale Q K^T for the keys that a query sees, capped where there is a cap, and the
// forward's lse_i = log sum_j exp(S_ij):
//
//     P_ij = exp(S_ij - lse_i)      delta_i = sum_d dO_id O_id - dlse_i      dS = P (dO V^T - delta) [(1 - tanh^2)]
//     dV = P^T dO                       dQ = scale dS K                     dK = scale dS^T Q
//
// Five products, of 2 D operations a visible pair each. P and dS exist a tile at a time (backward_keys.h).
//
// KEY BLOCKS OUTSIDE, QUERIES INSIDE. A task is a key head of a group of queries (backward_plan.h). It packs
// the group's rows of Q and dO once, in float32 or pairs of bfloat16, and takes block after block of 96 keys past them.
// dK and dV of a block stay in the caches for the whole pass; dQ is a float32 sum beside the packed rows. The other way
// round, two sums would travel instead of one. The query heads that share a key head are rows of the same task, so dK
// and dV need no sum over tasks.
//
// DETERMINISTIC. Keys have one owner, as no group shares keys with another. Where groups and heads are few, a group is
// cut into chunks of at least kChunkKeys keys, each with a dQ of its own, which are added in the order of the chunks.
// The cuts follow from the shapes, never from the number of threads.
//
// MEMORY MOVED: a task reads its rows of Q, dO, O and its keys once and writes its gradients once; in between, the
// packed rows, 8 D + 4 D bytes in float32, pass once a key block: 120 operations a byte. Working memory: the packed
// rows of the largest task a thread, and dQ once a chunk; all linear in the number of tokens.
#include <deque>

#include "cpu/span_attention/backward_keys.h"
#include "cpu/span_attention/backward_pairs.h"

namespace mmk::MMK_ISA {
namespace attention_backward {
namespace {

constexpr int64_t kChunkKeys = 1024;                   // smaller chunks pack rows too often: 512 cost 4 %
constexpr int64_t kEnoughTasks = 32, kMostChunks = 8;  // each chunk is a dQ more

struct Task {
    const Plan* plan;
    int64_t batch, head;  // a key head
    int64_t first_row, last_row, first_key, last_key;
    int64_t part;  // where its dQ lies among the parts, -1: it is the only one of its rows
    bool is_tiny;  // few enough rows and keys to go pair by pair
};

struct Split {  // a group and head that is cut into chunks: tasks [first, last)
    int64_t first, last;
    int64_t first_row, last_row;
};

// ---- a thread's working memory

template <class T>
struct Workspace {
    using Operand = OperandOf<T>;

    Workspace(const SpanAttentionBackward& call, int64_t rows, Arena& memory)
        : rows(rows, call.q.dim, call.v.dim, memory),
          keys(call.q.dim, call.v.dim, Softmax(call.scale, call.softcap), memory),
          pairs(call, memory) {}

    QueryRows<Operand> rows;
    KeyBlock<Operand> keys;
    FewPairs<T> pairs;
};

template <class T>
class Backward {
  public:
    using Operand = OperandOf<T>;

    explicit Backward(const SpanAttentionBackward& call)
        : call_(call), heads_(call.q.heads / call.k.heads), d_q_stride_(round_up(call.q.dim, kLanes)) {
        const int64_t plans = call.spans.batch_stride == 0 ? std::min<int64_t>(1, call.q.batch) : call.q.batch;
        for (int64_t b = 0; b < plans; b++) {
            plans_.emplace_back(SpanTable(call.spans, b, call.k.tokens), call.k.tokens, heads_);
        }
        add_tasks();
    }

    void run() const {
        const int threads = useful_threads(flops_);
        const int64_t workers = std::min<int64_t>(threads, static_cast<int64_t>(tasks_.size()));
        Scratch<float> parts(part_size_);
        Arena count(nullptr);
        workspace(count);
        Scratch<uint32_t> memory(workers * count.used());
        std::deque<Workspace<T>> workspaces;
        for (int64_t i = 0; i < workers; i++) {
            Arena arena(memory.get() + i * count.used());
            workspaces.push_back(workspace(arena));
        }
        for_each(call_.k.batch, threads, [&](int64_t b, int64_t) { clear_unseen(b); });
        for_each(static_cast<int64_t>(tasks_.size()), threads, [&](int64_t i, int64_t worker) {
            const Task& next = tasks_[std::min(i + 1, num_tasks() - 1)];  // most likely, too
            ask_for(tasks_[i], next, workspaces[worker].keys.prefetcher);
            run_task(tasks_[i], parts.get(), workspaces[worker]);
        });
        for_each(static_cast<int64_t>(splits_.size()), threads,
                 [&](int64_t i, int64_t) { add_parts(splits_[i], parts.get()); });
    }

  private:
    const Plan& plan(int64_t b) const { return plans_[plans_.size() == 1 ? 0 : b]; }
    Workspace<T> workspace(Arena& memory) const { return {call_, max_rows_, memory}; }

    void add_tasks() {
        int64_t units = 0;
        for (int64_t b = 0; b < call_.q.batch; b++)
            units += static_cast<int64_t>(plan(b).groups.size()) * call_.k.heads;
        const int64_t most = std::clamp<int64_t>(kEnoughTasks / std::max<int64_t>(1, units), 1, kMostChunks);
        for (int64_t b = 0; b < call_.q.batch; b++) {
            for (const Group& group : plan(b).groups) {
                for (int64_t head = 0; head < call_.k.heads; head++) add_tasks(plan(b), group, b, head, most);
            }
        }
    }

    // A group and head, cut into at most `most` chunks.
    void add_tasks(const Plan& plan, const Group& group, int64_t b, int64_t head, int64_t most) {
        const int64_t keys = group.last_key - group.first_key;
        const int64_t chunks = std::clamp<int64_t>(keys / kChunkKeys, 1, most);
        const int64_t chunk = round_up(ceil_div(keys, chunks), kBlockKeys), first = num_tasks();
        flops_ +=
            10.0 * static_cast<double>(group.last_row - group.first_row) * static_cast<double>(keys * call_.q.dim);
        int64_t key = group.first_key;
        do {
            Task task{&plan, b,    head, group.first_row, group.last_row, key, std::min(key + chunk, group.last_key),
                      -1,    false};
            task.is_tiny = is_tiny(task);
            if (chunks > 1) {
                trim(task);
                task.part = part_size_;
                part_size_ += (task.last_row - task.first_row) * d_q_stride_;
            }
            max_rows_ = std::max(max_rows_, task.last_row - task.first_row);
            tasks_.push_back(task);
            key = task.last_key;
        } while (key < group.last_key);
        if (chunks > 1) splits_.push_back({first, num_tasks(), group.first_row, group.last_row});
    }
    static bool is_tiny(const Task& task) {
        constexpr int64_t kMost = FewPairs<T>::kMost;
        if (task.last_key - task.first_key > kMost || task.last_row - task.first_row > round_up(kMost, kTileRows)) {
            return false;
        }
        const auto rows = task.plan->rows.begin();
        return std::count_if(rows + task.first_row, rows + task.last_row, [](Row row) { return row.query >= 0; }) <=
               kMost;
    }
    int64_t num_tasks() const { return static_cast<int64_t>(tasks_.size()); }

    // Leaves out the rows before the first and after the last that see a key of the chunk.
    static void trim(Task& task) {
        const auto idle = [&](int64_t row) { return !task.plan->meets(row, task.first_key, task.last_key); };
        while (task.first_row < task.last_row && idle(task.first_row)) task.first_row += kTileRows;
        while (task.first_row < task.last_row && idle(task.last_row - 1)) task.last_row -= kTileRows;
    }

    // What the next task reads, and where this one's gradients go.
    void ask_for(const Task& task, const Task& next, Prefetcher& prefetcher) const {
        ask_for_keys(next, {&call_.k, &call_.v}, prefetcher);
        ask_for_queries(next, {&call_.q, &call_.d_out, &call_.out}, prefetcher);
        if (GradientRows<T>(call_.d_q, 0, 0).streams) return;
        ask_for_queries(task, {&call_.d_q}, prefetcher);
        ask_for_keys(task, {&call_.d_k, &call_.d_v}, prefetcher);
    }
    void ask_for_keys(const Task& task, std::initializer_list<const Heads*> tensors, Prefetcher& prefetcher) const {
        for (const Heads* x : tensors) {
            const HeadRows<const T> head(*x, task.batch, task.head);
            prefetcher.add(head.row(task.first_key), head.stride, task.last_key - task.first_key, x->dim);
        }
    }
    void ask_for_queries(const Task& task, std::initializer_list<const Heads*> tensors, Prefetcher& prefetcher) const {
        if (task.first_row == task.last_row) return;
        for (const Heads* x : tensors) {
            const HeadRows<const T> head(*x, task.batch, task.head * heads_);
            const int64_t together = x->head_stride == x->dim ? heads_ : 1;  // heads that lie together
            prefetcher.add(head.row(task.plan->rows[task.first_row].query), head.stride,
                           (task.last_row - task.first_row) / heads_, together * x->dim);
        }
    }

    void run_task(const Task& task, float* parts, Workspace<T>& memory) const {
        if (task.is_tiny) {
            return memory.pairs.run(*task.plan, task.batch, task.head, task.head * heads_, task.first_row,
                                    task.last_row, task.first_key, task.last_key);
        }
        QueryRows<Operand>& rows = memory.rows;
        const int64_t count = task.last_row - task.first_row;
        QueryRows<Operand> mine = rows;
        if (task.part >= 0) mine.d_q = parts + task.part;
        mine.few = count <= kFewRows;
        pack(task, mine);
        std::fill_n(mine.d_q, count * d_q_stride_, 0.0f);
        KeyBlock<Operand>& block = memory.keys;
        if (std::is_same_v<T, float> && mine.few && task.part < 0) normalize(task, mine, block);
        if (call_.d_lse != nullptr) subtract_d_lse(task, mine);
        const GradientRows<T> d_k(call_.d_k, task.batch, task.head), d_v(call_.d_v, task.batch, task.head);
        for (int64_t key = task.first_key; key < task.last_key; key += kBlockKeys) {
            pack(task, key, block);
            for (int64_t row = 0; row < count; row += kBlockRows) {
                block.meet(*task.plan, task.first_row + row, mine, row, std::min<int64_t>(kBlockRows, count - row));
            }
            block.store_gradients(*task.plan, static_cast<float>(call_.scale), d_k, d_v);
        }
        if (task.part >= 0) return;
        for (int64_t r = 0; r < count; r++) {
            const float* sums = mine.d_q + r * d_q_stride_;
            write_query(task, task.first_row + r, [&](int64_t d) { return load(sums + d); });
        }
    }

    void pack(const Task& task, int64_t key, KeyBlock<Operand>& block) const {
        const HeadRows<const T> k(call_.k, task.batch, task.head), v(call_.v, task.batch, task.head);
        block.pack(*task.plan, key, std::min<int64_t>(kBlockKeys, task.last_key - key), k.data, k.stride, v.data,
                   v.stride);
    }

    // The forward took its scores in another order, and rounded its lse and result: the weights of a row are all too
    // large or all too small by that, and its dS are off by delta's error times them. Where rows are few this does not
    // average out, so lse and delta are moved to where P adds up to 1 and dS to 0.
    void normalize(const Task& task, QueryRows<Operand>& rows, KeyBlock<Operand>& block) const {
        const int64_t count = task.last_row - task.first_row;
        double p_totals[kFewRows] = {}, d_totals[kFewRows] = {};
        for (int64_t key = task.first_key; key < task.last_key; key += kBlockKeys) {
            pack(task, key, block);
            block.add_up(*task.plan, task.first_row, rows, 0, count, p_totals, d_totals);
        }
        for (int64_t r = 0; r < count; r++) {
            const double lse = rows.lse[r].first + static_cast<double>(rows.lse[r].rest), total = p_totals[r];
            if (!(total > 0.5 && total < 2)) continue;  // a row of padding, or of NaN
            rows.lse[r] = TwoFloats(lse + __builtin_log2(total));
            if (call_.softcap == 0) rows.delta[r] += static_cast<float>(d_totals[r] / total);
        }
    }

    // After normalize, which moves delta to where dS without this adds up to 0.
    void subtract_d_lse(const Task& task, QueryRows<Operand>& rows) const {
        for (int64_t r = 0; r < task.last_row - task.first_row; r++) {
            if (!task.plan->sees_anything(task.first_row + r)) continue;  // whatever d_lse holds there
            const Row row = task.plan->rows[task.first_row + r];
            const int64_t head = task.head * heads_ + row.head;
            rows.delta[r] -= call_.d_lse[(task.batch * call_.q.heads + head) * call_.q.tokens + row.query];
        }
    }

    // The rows of a task that see anything; the others are zeros, whatever the tensors hold there.
    void pack(const Task& task, QueryRows<Operand>& rows) const {
        const int64_t count = task.last_row - task.first_row;
        for (int64_t r = 0; r < count; r++) {
            const Row row = task.plan->rows[task.first_row + r];
            const T *q = nullptr, *d_out = nullptr;
            rows.lse[r] = TwoFloats(0);
            rows.delta[r] = 0;
            if (task.plan->sees_anything(task.first_row + r)) {
                const int64_t head = task.head * heads_ + row.head;
                q = HeadRows<const T>(call_.q, task.batch, head).row(row.query);
                d_out = HeadRows<const T>(call_.d_out, task.batch, head).row(row.query);
                const T* out = HeadRows<const T>(call_.out, task.batch, head).row(row.query);
                const float lse = call_.lse[(task.batch * call_.q.heads + head) * call_.q.tokens + row.query];
                rows.lse[r] = TwoFloats(lse * kLog2e);
                rows.delta[r] = dot(d_out, out, call_.v.dim);
            }
            rows.q.put(r, q);
            rows.d_out.put(r, d_out);
        }
        rows.q.finish(0, count);
        rows.d_out.finish(0, count);
    }

    // sums(d): kLanes of the row's sums.
    template <class Sums>
    MMK_INLINE void write_query(const Task& task, int64_t plan_row, Sums&& sums) const {
        const Row row = task.plan->rows[plan_row];
        if (row.query < 0) return;
        const GradientRows<T> d_q(call_.d_q, task.batch, task.head * heads_ + row.head);
        const Vec scale = splat(static_cast<float>(call_.scale));
        const bool idle = !task.plan->sees_anything(plan_row);  // its tile may have met a NaN that others see
        for (int64_t d = 0; d < call_.q.dim; d += kLanes) {
            d_q.put(row.query, d, idle ? Vec{} : sums(d) * scale);
        }
    }

    // dQ of the rows of a group whose keys were cut.
    void add_parts(const Split& split, const float* parts) const {
        for (int64_t row = split.first_row; row < split.last_row; row++) {
            write_query(tasks_[split.first], row, [&](int64_t d) {
                Vec total{};
                for (int64_t i = split.first; i < split.last; i++) {
                    const Task& task = tasks_[i];
                    if (row < task.first_row || row >= task.last_row) continue;
                    total += load(parts + task.part + (row - task.first_row) * d_q_stride_ + d);
                }
                return total;
            });
        }
    }

    // Keys of no group.
    void clear_unseen(int64_t b) const {
        int64_t end = 0;
        const auto clear = [&](int64_t last) {
            for (int64_t head = 0; head < call_.k.heads && end < last; head++) {
                const HeadRows<T> d_k(call_.d_k, b, head), d_v(call_.d_v, b, head);
                for (int64_t j = end; j < last; j++) {
                    memset(d_k.row(j), 0, call_.k.dim * sizeof(T));
                    memset(d_v.row(j), 0, call_.v.dim * sizeof(T));
                }
            }
        };
        for (const Group& group : plan(b).groups) {
            if (group.first_key >= group.last_key) continue;
            clear(group.first_key);
            end = group.last_key;
        }
        clear(call_.k.tokens);
    }

    const SpanAttentionBackward& call_;
    int64_t heads_;  // query heads that share a key head
    int64_t d_q_stride_;
    std::deque<Plan> plans_;
    std::vector<Task> tasks_;
    std::vector<Split> splits_;
    int64_t max_rows_ = 0, part_size_ = 0;
    double flops_ = 0;
};

}  // namespace
}  // namespace attention_backward

void span_attention_backward(const SpanAttentionBackward& call) {
    with_element_type(call.q.dtype, [&](auto type) { attention_backward::Backward<decltype(type)>(call).run(); });
}

}  // namespace mmk::MMK_ISA
