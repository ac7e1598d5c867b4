// One velocity of MMDiT-X: patch embedding, all blocks, final layer, in one parallel region.
//
// The idea: a step is a list of phases, each a set of independent tasks (image, text and dual
// stream together), so that threads meet nine times a block and Python is called once a step.
// Cost of a block at width D, N image and T text tokens: 2 (16 N + 12 T) D^2 + 4 ((N + T)^2 + N^2) D
// operations with dual attention. Memory: activations of one block, [N, 4 D] the largest.
// Source: Esser et al. 2024 (MMDiT); the MMDiT-X blocks of SD3.5-Medium as diffusers has them
// (models/attention.py, JointTransformerBlock).
#pragma once
#include "attention_int8.h"
#include "norm.h"

namespace sd35 {

struct Projections {
  Linear qkv, out;
  const float *q_norm, *k_norm;
};

struct Stream {
  Projections attention;
  Linear up, down;
};

struct Block {
  Stream image, text;
  Projections dual;
  int64_t has_dual;
  int64_t last;  // text gives keys and values only and ends here
};

struct Model {
  int64_t layers, heads, head_dim, width, patch, in_channels, out_channels, hidden_chunk, kind;
  const Block* blocks;
  Linear embed, final;
  double eps;
};

struct Step {
  const float *latents, *context, *modulation, *position;
  float* velocity;
  const uint8_t* skip;  // [layers]
  void* scratch;
  int64_t* nanoseconds;  // [PARTS] that the time of each part is added to, or null
  int64_t batch, h, w, text, modulation_width, threads;  // h, w in patches

  int64_t image() const { return h * w; }
};

// Hands out aligned pieces of one buffer; with a null buffer it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base + used);
    used = round_up(used + count * static_cast<int64_t>(sizeof(T)), 64);
    return base ? piece : nullptr;
  }
  Rows rows(int64_t kind, int64_t count, int64_t width, int64_t chunks) {
    if (kind == FP32) return {take<float>(count * width), nullptr, width, chunks};
    // AMX reads 32 rows whatever the rest is.
    if (kind == BF16) return {take<uint16_t>((count + 32) * width), nullptr, width, 1, BF16};
    uint8_t* data = take<uint8_t>((count + 32) * width);
    return {data, take<float>(count * chunks), width, chunks, INT8};
  }
};

// Every activation of a step; what a block leaves behind the next one overwrites.
struct Buffers {
  float *x, *text, *attended, *attended_dual, *attended_text, *threads;
  Rows patches, n, n_dual, n_text, mixed, mixed_dual, mixed_text, hidden, hidden_text, last;
  Heads joint{}, dual{};
#ifdef __AVX512VNNI__
  ByteHeads joint_bytes{}, dual_bytes{};
  static ByteHeads bytes(const Model& m, int64_t batch, int64_t tokens, Arena& arena);
#endif

  static int64_t thread_floats(const Model& m) { return std::max(TILE, 2 * m.width) + 64; }

  Buffers(const Model& m, const Step& s, Arena& arena) {
    const int64_t images = s.batch * s.image(), texts = s.batch * s.text, d = m.width;
    threads = arena.take<float>(s.threads * thread_floats(m));
    x = arena.take<float>(images * d), text = arena.take<float>(texts * d);
    attended = arena.take<float>(images * d), attended_dual = arena.take<float>(images * d);
    attended_text = arena.take<float>(texts * d);
    patches = arena.rows(FP32, images, m.embed.k, 1);
    last = arena.rows(FP32, images, d, 1);
    n = arena.rows(m.kind, images, d, 1), n_dual = arena.rows(m.kind, images, d, 1);
    n_text = arena.rows(m.kind, texts, d, 1);
    const int64_t chunks = 4 * d / m.hidden_chunk;
    hidden = arena.rows(m.kind, images, 4 * d, chunks);
    hidden_text = arena.rows(m.kind, texts, 4 * d, chunks);
    if (m.kind == FP32) {
      mixed = {attended, nullptr, d, 1}, mixed_dual = {attended_dual, nullptr, d, 1};
      mixed_text = {attended_text, nullptr, d, 1};
    } else {
      mixed = arena.rows(m.kind, images, d, 1), mixed_dual = arena.rows(m.kind, images, d, 1);
      mixed_text = arena.rows(m.kind, texts, d, 1);
    }
    const int64_t tokens = s.image() + s.text;
    if (m.kind != INT8) {
      joint = heads(m, s.batch, tokens, arena), dual = heads(m, s.batch, s.image(), arena);
      return;
    }
#ifdef __AVX512VNNI__
    joint_bytes = bytes(m, s.batch, tokens, arena), dual_bytes = bytes(m, s.batch, s.image(), arena);
#endif
  }

  static Heads heads(const Model& m, int64_t batch, int64_t tokens, Arena& arena) {
    Heads h{nullptr, nullptr, nullptr, m.heads, tokens, m.head_dim};
    h.q = arena.take<float>(batch * h.size()), h.k = arena.take<float>(batch * h.size());
    h.v = arena.take<float>(batch * h.size());
    return h;
  }
};

#ifdef __AVX512VNNI__
inline ByteHeads Buffers::bytes(const Model& m, int64_t batch, int64_t tokens, Arena& arena) {
  ByteHeads h{};
  h.heads = m.heads, h.tokens = tokens, h.dim = m.head_dim;
  const int64_t rows = batch * m.heads * h.padded();
  for (uint8_t** to : {&h.q, &h.k, &h.v}) *to = arena.take<uint8_t>(rows * h.dim);
  for (float** to : {&h.q_scale, &h.k_scale, &h.v_scale}) *to = arena.take<float>(rows);
  h.k_start = arena.take<int32_t>(rows);
  return h;
}
#endif

// The modulation vectors of one block, in the order of the caller's table.
struct BlockModulation {
  const float *shift, *scale, *gate, *shift_mlp, *scale_mlp, *gate_mlp, *shift2, *scale2, *gate2;
  const float *text_shift, *text_scale, *text_gate, *text_shift_mlp, *text_scale_mlp, *text_gate_mlp;

  // Takes its vectors from `table` and moves it on.
  BlockModulation(const Block& block, const float*& table, int64_t width) {
    auto next = [&](bool there) {
      const float* here = table;
      if (there) table += width;
      return there ? here : nullptr;
    };
    for (const float** v : {&shift, &scale, &gate, &shift_mlp, &scale_mlp, &gate_mlp}) *v = next(true);
    for (const float** v : {&shift2, &scale2, &gate2}) *v = next(block.has_dual);
    for (const float** v : {&text_shift, &text_scale}) *v = next(true);
    for (const float** v : {&text_gate, &text_shift_mlp, &text_scale_mlp, &text_gate_mlp})
      *v = next(!block.last);
  }
};

constexpr int64_t NORM_ROWS = 16;  // rows of a LayerNorm task
constexpr int64_t PHASES_PER_BLOCK = 10;

// What one thread does in one step.
struct Walk {
  const Model& m;
  const Step& s;
  Buffers& f;
  Team& team;
  const int64_t images = s.batch * s.image(), texts = s.batch * s.text, d = m.width;
  const float eps = static_cast<float>(m.eps);

  void run() {
    embed();
    const float* table = s.modulation;
    for (int64_t i = 0; i < m.layers; i++) {
      BlockModulation mod(m.blocks[i], table, d);
      if (!s.skip[i]) block(m.blocks[i], mod);
    }
    norm_phase([&](int64_t row, float* n) { modulate_row(row, s.image(), n, table, table + d, f.last); },
               nullptr);
    Grid grid(m.final, images, s.threads);
    team.tasks(FINAL, grid.count(), [&](int64_t i) {
      product_task(m.final, f.last, grid, i, team.scratch,
                   Unpatchify{s.velocity, s.h, s.w, m.patch, m.out_channels});
    });
  }

  void embed() {
    team.tasks(EMBED, ceil_div(images, NORM_ROWS), [&](int64_t i) {
      for (int64_t row = i * NORM_ROWS; row < std::min(images, (i + 1) * NORM_ROWS); row++) cut(row);
    });
    Grid grid(m.embed, images, s.threads);
    team.tasks(EMBED, grid.count(), [&](int64_t i) {
      product_task(m.embed, f.patches, grid, i, team.scratch,
                   AddPosition{f.x, s.position, s.image(), d});
    });
  }

  // One patch as a row (c, y, x); the first thread that comes by also copies the text.
  void cut(int64_t row) {
    const int64_t p = m.patch, b = row / s.image(), y = row / s.w % s.h, x = row % s.w;
    float* out = const_cast<float*>(f.patches.floats(row));
    for (int64_t c = 0; c < m.in_channels; c++)
      for (int64_t py = 0; py < p; py++) {
        const int64_t line = ((b * m.in_channels + c) * s.h + y) * p + py;
        std::memcpy(out, s.latents + (line * s.w + x) * p, p * sizeof(float)), out += p;
      }
    if (row == 0) std::memcpy(f.text, s.context, texts * d * sizeof(float));
  }

  void block(const Block& block, const BlockModulation& mod) {
    norm_phase(
        [&](int64_t row, float* n) {
          modulate_row(row, s.image(), n, mod.shift, mod.scale, f.n);
          if (block.has_dual) modulate_row(row, s.image(), n, mod.shift2, mod.scale2, f.n_dual);
        },
        mod.text_shift, mod.text_scale);
    project(block);
    attend(block);
    if (m.kind != FP32) requantise(block);
    output(block, mod);
    norm_phase(
        [&](int64_t row, float* n) {
          modulate_row(row, s.image(), n, mod.shift_mlp, mod.scale_mlp, f.n);
        },
        mod.text_shift_mlp, mod.text_scale_mlp);
    Grid up(block.image.up, images, s.threads, hidden_group());
    Grid text_up(block.last ? block.image.up : block.text.up, texts, s.threads, hidden_group());
    if (block.last) text_up.down = 0;
    team.tasks(UP, up.count() + text_up.count(), [&](int64_t i) {
      if (i < up.count()) product_task(block.image.up, f.n, up, i, team.scratch, Gelu{f.hidden});
      else product_task(block.text.up, f.n_text, text_up, i - up.count(), team.scratch, Gelu{f.hidden_text});
    });
    residual(DOWN, block.image.down, f.hidden, mod.gate_mlp, block.text.down, f.hidden_text,
             mod.text_gate_mlp);
  }

  int64_t hidden_group() const { return m.kind == INT8 ? m.hidden_chunk : 0; }

  void modulate_row(int64_t row, int64_t tokens, const float* n, const float* shift, const float* scale,
                    const Rows& out) {
    const int64_t image = over(row, tokens) * s.modulation_width;
    modulate(n, d, {shift + image, scale + image}, out, row, team.scratch + d);
  }

  // LayerNorm of both streams; text's only where it has a modulation.
  template <class F>
  void norm_phase(F&& image_row, const float* text_shift, const float* text_scale = nullptr) {
    const int64_t first = ceil_div(images, NORM_ROWS);
    const int64_t second = text_shift ? ceil_div(texts, NORM_ROWS) : 0;
    float* n = team.scratch;
    team.tasks(NORM, first + second, [&](int64_t i) {
      const bool text = i >= first;
      const int64_t row0 = (text ? i - first : i) * NORM_ROWS;
      for (int64_t row = row0; row < std::min(text ? texts : images, row0 + NORM_ROWS); row++) {
        normalise((text ? f.text : f.x) + row * d, d, eps, n);
        if (text) modulate_row(row, s.text, n, text_shift, text_scale, f.n_text);
        else image_row(row, n);
      }
    });
  }

  // q, k, v of image, text and dual attention, written where attention reads them.
  void project(const Block& block) {
    if (m.kind != INT8) return project_into<SplitHeads>(block, f.joint, f.dual);
#ifdef __AVX512VNNI__
    project_into<SplitByteHeads>(block, f.joint_bytes, f.dual_bytes);
#endif
  }

  template <class Split, class H>
  void project_into(const Block& block, const H& joint, const H& own) {
    const Projections &a = block.image.attention, &t = block.text.attention, &b = block.dual;
    Grid image(a.qkv, images, s.threads), text(t.qkv, texts, s.threads), dual = image;
    if (!block.has_dual) dual.down = 0;
    const Split to_image{joint, a.q_norm, a.k_norm, eps, s.image(), 0, 0};
    const Split to_text{joint, t.q_norm, t.k_norm, eps, s.text, s.image(), 3 * d - t.qkv.n};
    const Split to_dual{own, b.q_norm, b.k_norm, eps, s.image(), 0, 0};
    team.tasks(QKV, image.count() + dual.count() + text.count(), [&](int64_t i) {
      if (i < image.count()) product_task(a.qkv, f.n, image, i, team.scratch, to_image);
      else if ((i -= image.count()) < dual.count())
        product_task(b.qkv, f.n_dual, dual, i, team.scratch, to_dual);
      else product_task(t.qkv, f.n_text, text, i - dual.count(), team.scratch, to_text);
    });
  }

  void attend(const Block& block) {
    const AttentionGrid joint(s.batch, m.heads, block.last ? s.image() : s.image() + s.text);
    AttentionGrid dual(s.batch, m.heads, s.image());
    if (!block.has_dual) dual.batch = 0;
    const Joined to{f.attended, f.attended_text, s.image(), s.text, d};
    const Joined to_dual{f.attended_dual, nullptr, s.image(), 0, d};
    team.tasks(ATTENTION, joint.count() + dual.count(), [&](int64_t i) {
      const bool first = i < joint.count();
      const AttentionGrid& grid = first ? joint : dual;
      const int64_t task = first ? i : i - joint.count();
      if (m.kind != INT8) attention_task(first ? f.joint : f.dual, grid, task, first ? to : to_dual);
#ifdef __AVX512VNNI__
      else
        byte_attention_task(first ? f.joint_bytes : f.dual_bytes, grid, task, first ? to : to_dual);
#endif
    });
  }

  // Attention's output in the layout of the next product.
  void requantise(const Block& block) {
    const int64_t first = ceil_div(images, NORM_ROWS), second = block.has_dual ? first : 0;
    const int64_t third = block.last ? 0 : ceil_div(texts, NORM_ROWS);
    team.tasks(QUANTISE, first + second + third, [&](int64_t i) {
      if (i < first) quantise_rows(f.attended, images, i, f.mixed);
      else if ((i -= first) < second) quantise_rows(f.attended_dual, images, i, f.mixed_dual);
      else quantise_rows(f.attended_text, texts, i - second, f.mixed_text);
    });
  }

  void quantise_rows(const float* x, int64_t rows, int64_t task, const Rows& out) {
    for (int64_t row = task * NORM_ROWS; row < std::min(rows, (task + 1) * NORM_ROWS); row++)
      emit(out, row, 0, x + row * d, d);
  }

  void output(const Block& block, const BlockModulation& mod) {
    residual(OUT, block.image.attention.out, f.mixed, mod.gate, block.text.attention.out, f.mixed_text,
             block.last ? nullptr : mod.text_gate);
    if (!block.has_dual) return;
    residual(OUT, block.dual.out, f.mixed_dual, mod.gate2, block.dual.out, f.mixed_dual, nullptr);
  }

  // x += gate * layer(rows), for the image stream and, where it has a gate, for text.
  void residual(Part part, const Linear& layer, const Rows& rows, const float* gate, const Linear& text_layer,
                const Rows& text_rows, const float* text_gate) {
    Grid image(layer, images, s.threads), text(layer, texts, s.threads);
    if (!text_gate) text.down = 0;
    const AddGated add{f.x, gate, s.modulation_width, s.image(), d};
    const AddGated add_text{f.text, text_gate, s.modulation_width, s.text, d};
    team.tasks(part, image.count() + text.count(), [&](int64_t i) {
      if (i < image.count()) product_task(layer, rows, image, i, team.scratch, add);
      else product_task(text_layer, text_rows, text, i - image.count(), team.scratch, add_text);
    });
  }
};

inline int64_t scratch_bytes(const Model& m, const Step& s) {
  Arena arena{nullptr};
  Buffers(m, s, arena);
  return arena.used;
}

inline void step(const Model& m, const Step& s) {
  Arena arena{static_cast<char*>(s.scratch)};
  Buffers buffers(m, s, arena);
  const int64_t phases = m.layers * PHASES_PER_BLOCK + 8;
  run_team(static_cast<int>(s.threads), phases, buffers.threads, Buffers::thread_floats(m), s.nanoseconds,
           [&](Team& team) {
#ifdef SD35_AMX
             if (m.kind != FP32) tiles_begin();
#endif
             Walk{m, s, buffers, team}.run();
#ifdef SD35_AMX
             if (m.kind != FP32) tiles_end();
#endif
           });
}

}  // namespace sd35
