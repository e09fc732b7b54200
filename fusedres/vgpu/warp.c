// What the lanes of a warp do together: exchange values, load matrices, multiply them. Each function is called once per
// warp with what every lane brought, in the order of the lanes. Fragment layouts follow the PTX ISA (mma.m16n8k16,
// mma.m16n8k8, wgmma, ldmatrix) and AMD's RDNA3 ISA (v_wmma, DPP, permlane).

#include <math.h>
#include <string.h>

#include "runtime.h"

typedef uint32_t u32;
typedef uint16_t u16;

static float from_bf16(u16 x) {
  u32 bits = (u32)x << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static float from_f16(u16 x) {
  _Float16 h;
  memcpy(&h, &x, 2);
  return (float)h;
}

// Tensor cores read fp32 as tf32: the 13 lowest bits of the fraction are not looked at.
static float from_tf32(u32 x) {
  x &= 0xffffe000u;
  float f;
  memcpy(&f, &x, 4);
  return f;
}

// The compiler of the host may have no conversion to bf16; x86-64 passes it as it passes _Float16.
_Float16 __truncsfbf2(float f) {
  u32 bits;
  memcpy(&bits, &f, 4);
  u16 r = (bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  _Float16 h;
  memcpy(&h, &r, 2);
  return h;
}

// ------------------------------------------------------------------------------------------------------------ exchange

void vgpu_warp_barrier(call **lanes, int size) { (void)lanes, (void)size; }

typedef struct {
  u32 mask, value;
  int which, clamp;
} shuffle;

// PTX shfl: `clamp` holds the segment mask in bits 8 to 12 and the last lane of a segment in bits 0 to 4.
#define SHUFFLE(name, source, in_range)                                           \
  void vgpu_shuffle_##name(call **lanes, int size) {                              \
    u32 out[64];                                                                  \
    for (int l = 0; l < size; l++) {                                              \
      const shuffle *s = lanes[l]->in;                                            \
      int segment = s->clamp >> 8 & 31, low = l & segment;                        \
      int high = low | (s->clamp & ~segment & 31), b = s->which, from = (source); \
      (void)low, (void)high;                                                      \
      if (!(in_range)) from = l;                                                  \
      out[l] = ((const shuffle *)lanes[from & 31]->in)->value;                    \
    }                                                                             \
    for (int l = 0; l < size; l++) *(u32 *)lanes[l]->out = out[l];                \
  }

SHUFFLE(bfly, l ^ b, from <= high)
SHUFFLE(idx, low | (b & ~segment), from <= high)
SHUFFLE(up, l - b, from >= high)
SHUFFLE(down, l + b, from <= high)

typedef struct {
  u32 mask, predicate;
} ballot;

void vgpu_ballot(call **lanes, int size) {
  u32 votes = 0;
  for (int l = 0; l < size; l++) votes |= (((const ballot *)lanes[l]->in)->predicate & 1) << l;
  for (int l = 0; l < size; l++) *(u32 *)lanes[l]->out = votes;
}

typedef struct {
  u32 value, mask;
} redux;

#define REDUX(name, type, result)                                                         \
  void vgpu_redux_##name(call **lanes, int size) {                                        \
    type a = (type)((const redux *)lanes[0]->in)->value;                                  \
    for (int l = 1; l < size; l++) {                                                      \
      type b = (type)((const redux *)lanes[l]->in)->value;                                \
      a = (result);                                                                       \
    }                                                                                     \
    for (int l = 0; l < size; l++) *(u32 *)lanes[l]->out = (u32)a;                        \
  }

REDUX(add, u32, a + b)
REDUX(and, u32, a & b)
REDUX(or, u32, a | b)
REDUX(xor, u32, a ^ b)
REDUX(min, int32_t, a < b ? a : b)
REDUX(max, int32_t, a > b ? a : b)
REDUX(umin, u32, a < b ? a : b)
REDUX(umax, u32, a > b ? a : b)

typedef struct {
  u32 leader;
  uint8_t leads;
} election;

void vgpu_elect(call **lanes, int size) {
  for (int l = 0; l < size; l++) *(election *)lanes[l]->out = (election){0, l == 0};
}

void vgpu_first_lane(call **lanes, int size) {
  u32 value = *(const u32 *)lanes[0]->in;
  for (int l = 0; l < size; l++) *(u32 *)lanes[l]->out = value;
}

typedef struct {
  u32 value, lane;
} read_lane;

void vgpu_read_lane(call **lanes, int size) {
  u32 out[64];
  for (int l = 0; l < size; l++)
    out[l] = ((const read_lane *)lanes[((const read_lane *)lanes[l]->in)->lane & (size - 1)]->in)->value;
  for (int l = 0; l < size; l++) *(u32 *)lanes[l]->out = out[l];
}

typedef struct {
  u32 address, value;
} permute;

void vgpu_bpermute(call **lanes, int size) {
  u32 out[64];
  for (int l = 0; l < size; l++)
    out[l] = ((const permute *)lanes[((const permute *)lanes[l]->in)->address >> 2 & (size - 1)]->in)->value;
  for (int l = 0; l < size; l++) *(u32 *)lanes[l]->out = out[l];
}

typedef struct {
  u32 old, value, control, row_mask, bank_mask, bound_control;
} dpp;

// The lane that a DPP control word names for lane `l`, -1 outside the row, -2 for a control word of another family.
static int dpp_source(u32 control, int l) {
  int row = l & ~15, i = l & 15, n = control & 15;
  if (control < 0x100) return (l & ~3) + (control >> 2 * (l & 3) & 3);
  switch (control & 0x1f0) {
    case 0x100: return i + n < 16 ? l + n : -1;       // row_shl
    case 0x110: return i - n >= 0 ? l - n : -1;       // row_shr
    case 0x120: return row + ((i - n) & 15);          // row_ror
    case 0x140: return n == 0 ? row + 15 - i : n == 1 ? row + ((i & 8) | (7 - (i & 7))) : -2;  // (half-)row mirror
    case 0x150: return row + n;                       // row_share
    case 0x160: return row + (i ^ n);                 // row_xmask
    default: return -2;
  }
}

void vgpu_dpp(call **lanes, int size) {
  u32 out[64];
  for (int l = 0; l < size; l++) {
    const dpp *d = lanes[l]->in;
    int from = dpp_source(d->control, l);
    if (from == -2) vgpu_refuse("update.dpp with this control word");
    int enabled = d->row_mask >> (l >> 4) & 1 && d->bank_mask >> ((l & 15) >> 2) & 1;
    out[l] = !enabled ? d->old : from >= 0 ? ((const dpp *)lanes[from]->in)->value : d->bound_control ? 0 : d->old;
  }
  for (int l = 0; l < size; l++) *(u32 *)lanes[l]->out = out[l];
}

typedef struct {
  u32 old, value, low, high, fetch_inactive, bound_control;
} permlane;

static void permute_rows(call **lanes, int size, int other_row) {
  u32 out[64];
  for (int l = 0; l < size; l++) {
    const permlane *p = lanes[l]->in;
    uint64_t selectors = (uint64_t)p->high << 32 | p->low;
    int from = ((l & ~15) ^ other_row) + (int)(selectors >> 4 * (l & 15) & 15);
    out[l] = ((const permlane *)lanes[from]->in)->value;
  }
  for (int l = 0; l < size; l++) *(u32 *)lanes[l]->out = out[l];
}

void vgpu_permlane16(call **lanes, int size) { permute_rows(lanes, size, 0); }
void vgpu_permlanex16(call **lanes, int size) { permute_rows(lanes, size, 16); }

// ----------------------------------------------------------------------------------------------------- multiplications

// d += a b with a of m x k, b of k x n, all of them rows of their last dimension.
static inline __attribute__((always_inline)) void multiply(int m, int n, int k, const float *a, const float *b, float *d) {
  for (int i = 0; i < m; i++)
    for (int j = 0; j < k; j++)
      for (int c = 0; c < n; c++) d[i * n + c] += a[i * k + j] * b[j * n + c];
}

typedef struct {
  u32 a[4], b[2];
  float c[4];
} mma_call;

#define EACH_ACCUMULATOR(l, i) \
  for (int l = 0; l < 32; l++) \
    for (int i = 0; i < 4; i++)
#define ROW(l, i) ((l >> 2) + 8 * (i >> 1))
#define COLUMN(l, i) (2 * (l & 3) + (i & 1))

// Fragments of m16n8k16 in 16 bits: a register holds two neighbours in k.
#define MMA_16_BIT(name, convert)                                                                             \
  void vgpu_mma_##name(call **lanes, int size) {                                                              \
    float a[16 * 16], b[16 * 8], d[16 * 8];                                                                   \
    (void)size;                                                                                               \
    for (int l = 0; l < 32; l++) {                                                                            \
      const mma_call *m = lanes[l]->in;                                                                       \
      for (int h = 0; h < 2; h++) {                                                                           \
        int k = 2 * (l & 3) + h;                                                                              \
        for (int i = 0; i < 4; i++)                                                                           \
          a[((l >> 2) + 8 * (i & 1)) * 16 + k + 8 * (i >> 1)] = convert((u16)(m->a[i] >> 16 * h));             \
        for (int i = 0; i < 2; i++) b[(k + 8 * i) * 8 + (l >> 2)] = convert((u16)(m->b[i] >> 16 * h));         \
      }                                                                                                       \
    }                                                                                                         \
    EACH_ACCUMULATOR(l, i) d[ROW(l, i) * 8 + COLUMN(l, i)] = ((const mma_call *)lanes[l]->in)->c[i];          \
    multiply(16, 8, 16, a, b, d);                                                                             \
    EACH_ACCUMULATOR(l, i) ((float *)lanes[l]->out)[i] = d[ROW(l, i) * 8 + COLUMN(l, i)];                     \
    vgpu_count_tensor(16 * 8 * 16);                                                                           \
  }

MMA_16_BIT(bf16, from_bf16)
MMA_16_BIT(f16, from_f16)

// m16n8k8
void vgpu_mma_tf32(call **lanes, int size) {
  float a[16 * 8], b[8 * 8], d[16 * 8];
  (void)size;
  for (int l = 0; l < 32; l++) {
    const mma_call *m = lanes[l]->in;
    for (int i = 0; i < 4; i++) a[((l >> 2) + 8 * (i & 1)) * 8 + (l & 3) + 4 * (i >> 1)] = from_tf32(m->a[i]);
    for (int i = 0; i < 2; i++) b[((l & 3) + 4 * i) * 8 + (l >> 2)] = from_tf32(m->b[i]);
  }
  EACH_ACCUMULATOR(l, i) d[ROW(l, i) * 8 + COLUMN(l, i)] = ((const mma_call *)lanes[l]->in)->c[i];
  multiply(16, 8, 8, a, b, d);
  EACH_ACCUMULATOR(l, i) ((float *)lanes[l]->out)[i] = d[ROW(l, i) * 8 + COLUMN(l, i)];
  vgpu_count_tensor(16 * 8 * 8);
}

// Eight rows of 16 bytes make a matrix; lanes 8 m to 8 m + 7 bring the rows of matrix m.
static void load_matrices(call **lanes, int count, int transposed) {
  const char *rows[32];
  for (int l = 0; l < 8 * count; l++) rows[l] = *(const char *const *)lanes[l]->in;
  for (int m = 0; m < count; m++) vgpu_rows_read(&rows[8 * m], 8, 16);
  for (int l = 0; l < 32; l++) {
    u32 *out = lanes[l]->out;
    for (int m = 0; m < count; m++) {
      const char *const *row = &rows[8 * m];
      if (transposed) {
        u16 pair[2];
        for (int h = 0; h < 2; h++) memcpy(&pair[h], row[2 * (l & 3) + h] + 2 * (l >> 2), 2);
        memcpy(&out[m], pair, 4);
      } else {
        memcpy(&out[m], row[l >> 2] + 4 * (l & 3), 4);
      }
    }
  }
}

#define LOAD_MATRICES(count)                                                                                   \
  void vgpu_ldmatrix_x##count(call **lanes, int size) { (void)size, load_matrices(lanes, count, 0); }          \
  void vgpu_ldmatrix_x##count##_trans(call **lanes, int size) { (void)size, load_matrices(lanes, count, 1); }

LOAD_MATRICES(1)
LOAD_MATRICES(2)
LOAD_MATRICES(4)

// What a lane brings to a store of matrices: the address of a row, and its share of each of `count` matrices.
static void store_matrices(call **lanes, int count, int transposed) {
  for (int m = 0; m < count; m++) {
    char *rows[8], data[8][16];
    for (int i = 0; i < 8; i++) memcpy(&rows[i], lanes[8 * m + i]->in, sizeof rows[i]);
    for (int l = 0; l < 32; l++) {
      u16 pair[2];
      memcpy(pair, (const char *)lanes[l]->in + sizeof(char *) + 4 * m, 4);
      for (int h = 0; h < 2; h++) {
        int row = l >> 2, column = 2 * (l & 3) + h;
        memcpy(transposed ? &data[column][2 * row] : &data[row][2 * column], &pair[h], 2);
      }
    }
    vgpu_rows_write(rows, (const char(*)[16])data, 8);
  }
}

#define STORE_MATRICES(count)                                                                                   \
  void vgpu_stmatrix_x##count(call **lanes, int size) { (void)size, store_matrices(lanes, count, 0); }          \
  void vgpu_stmatrix_x##count##_trans(call **lanes, int size) { (void)size, store_matrices(lanes, count, 1); }

STORE_MATRICES(1)
STORE_MATRICES(2)
STORE_MATRICES(4)

// Where a matrix descriptor puts the 16 bytes that begin at row `major` and 16-byte piece `piece` of its contiguous
// dimension. Strides are in units of 16 bytes; bits 62 and 63 name the swizzle (128, 64 or 32 bytes, or none).
static const char *piece_address(uint64_t descriptor, int transposed, int major, int piece) {
  u32 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  u32 stride = (descriptor >> 32 & 0x3fff) << 4, at;
  int swizzle = descriptor >> 62 & 3, width = swizzle == 1 ? 128 : swizzle == 2 ? 64 : swizzle == 3 ? 32 : 16;
  if (!swizzle && transposed) vgpu_refuse("wgmma operand with its rows contiguous and no swizzle");
  if (!transposed)
    at = start + major / 8 * stride + major % 8 * width + (u32)piece * (swizzle ? 16 : leading);
  else
    at = start + piece / (width / 16) * leading + major / 8 * stride + major % 8 * width + piece % (width / 16) * 16;
  if (swizzle == 1) at ^= (at >> 7 & 7) << 4;
  if (swizzle == 2) at ^= (at >> 7 & 3) << 4;
  if (swizzle == 3) at ^= (at >> 7 & 1) << 4;
  return vgpu_shared() + (at & 0x3ffff);
}

// Reads an operand into rows of its contiguous dimension: [rows][depth], or [depth][rows] when transposed.
static uint64_t gather(const operand *o, char *to, int issued) {
  int lines = o->transposed ? o->depth : o->rows, bytes = (o->transposed ? o->rows : o->depth) * o->bytes;
  int first_line = o->transposed ? 0 : o->first_row, first_piece = o->transposed ? o->first_row * o->bytes / 16 : 0;
  uint64_t digest = 0xcbf29ce484222325u;
  for (int line = 0; line < lines; line++)
    for (int piece = 0; piece < bytes / 16; piece++) {
      const char *from = piece_address(o->descriptor, o->transposed, first_line + line, first_piece + piece);
      vgpu_matrix_read(from, 16);
      if (issued) vgpu_async_touches(from, 16, -1);
      uint64_t words[2];
      memcpy(words, from, 16);
      memcpy(to + line * bytes + piece * 16, words, 16);
      digest = ((digest ^ words[0]) * 0x100000001b3u ^ words[1]) * 0x100000001b3u;
    }
  return digest;
}

uint64_t vgpu_operands_digest(const operand *a, const operand *b) {
  char scratch[256 * 16 * 2];
  return (a ? gather(a, scratch, 0) : 0) * 31 + gather(b, scratch, 0);
}

enum { BF16, F16, TF32 };

static float element(const void *from, int i, int type) {
  return type == BF16 ? from_bf16(((const u16 *)from)[i])
                      : type == F16 ? from_f16(((const u16 *)from)[i]) : from_tf32(((const u32 *)from)[i]);
}

// What one lane brings: sizes and descriptors are the same in all lanes; `a` holds registers if a_in_registers.
typedef struct {
  uint64_t a_descriptor, b_descriptor;
  u32 a[4];
  int columns, type, a_in_registers, a_transposed, b_transposed, accumulate;
  float c[128];
} wgmma_call;

// A warp's share of wgmma m64nNk16 (k8 in tf32): 16 of the 64 rows, all N columns.
void vgpu_wgmma(call **lanes, int size) {
  const wgmma_call *w = lanes[0]->in;
  int n = w->columns, bytes = w->type == TF32 ? 4 : 2, depth = 32 / bytes, first_row = 16 * (vgpu_warp() & 3);
  char raw[256 * 16 * 2];
  float a[16 * 16], b[16 * 256], d[16 * 256];
  uint64_t seen = 0;
  operand left = {w->a_descriptor, first_row, 16, depth, bytes, w->a_transposed};
  operand right = {w->b_descriptor, 0, n, depth, bytes, w->b_transposed};
  (void)size;
  if (w->a_in_registers) {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) {
        const u32 *word = &((const wgmma_call *)lanes[l]->in)->a[i];
        int row = (l >> 2) + 8 * (i & 1);
        if (bytes == 4)
          a[row * 8 + (l & 3) + 4 * (i >> 1)] = from_tf32(*word);
        else
          for (int h = 0; h < 2; h++) a[row * 16 + 2 * (l & 3) + h + 8 * (i >> 1)] = element(word, h, w->type);
      }
  } else {
    seen = gather(&left, raw, 1);
    for (int r = 0; r < 16; r++)
      for (int k = 0; k < depth; k++)
        a[r * depth + k] = element(raw, w->a_transposed ? k * 16 + r : r * depth + k, w->type);
  }
  seen = seen * 31 + gather(&right, raw, 1);
  for (int k = 0; k < depth; k++)
    for (int c = 0; c < n; c++) b[k * n + c] = element(raw, w->b_transposed ? k * n + c : c * depth + k, w->type);
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < n / 2; i++)
      d[((l >> 2) + 8 * (i >> 1 & 1)) * n + 8 * (i >> 2) + 2 * (l & 3) + (i & 1)] =
          w->accumulate ? ((const wgmma_call *)lanes[l]->in)->c[i] : 0;
  multiply(16, n, depth, a, b, d);
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < n / 2; i++)
      ((float *)lanes[l]->out)[i] = d[((l >> 2) + 8 * (i >> 1 & 1)) * n + 8 * (i >> 2) + 2 * (l & 3) + (i & 1)];
  vgpu_pending_add(w->a_in_registers ? 0 : &left, &right, seen);
  vgpu_count_tensor((int64_t)16 * n * depth);
}

void vgpu_wgmma_commit(call **lanes, int size) { (void)lanes, (void)size, vgpu_pending_commit(); }
void vgpu_wgmma_wait(call **lanes, int size) { (void)size, vgpu_pending_wait(*(const int *)lanes[0]->in); }

typedef struct {
  u16 a[16], b[16];
  float c[8];
} wmma_call;

// Lane l holds row (of a) and column (of b) l % 16; element i of its result is row 2 i + l / 16, column l % 16.
#define WMMA(name, convert)                                                                                        \
  void vgpu_wmma_##name(call **lanes, int size) {                                                                  \
    float a[16 * 16], b[16 * 16], d[16 * 16];                                                                      \
    (void)size;                                                                                                    \
    for (int l = 0; l < 16; l++)                                                                                   \
      for (int k = 0; k < 16; k++) {                                                                               \
        a[l * 16 + k] = convert(((const wmma_call *)lanes[l]->in)->a[k]);                                          \
        b[k * 16 + l] = convert(((const wmma_call *)lanes[l]->in)->b[k]);                                          \
      }                                                                                                            \
    for (int l = 0; l < 32; l++)                                                                                   \
      for (int i = 0; i < 8; i++) d[(2 * i + (l >> 4)) * 16 + (l & 15)] = ((const wmma_call *)lanes[l]->in)->c[i]; \
    multiply(16, 16, 16, a, b, d);                                                                                 \
    for (int l = 0; l < 32; l++)                                                                                   \
      for (int i = 0; i < 8; i++) ((float *)lanes[l]->out)[i] = d[(2 * i + (l >> 4)) * 16 + (l & 15)];             \
    vgpu_count_tensor(16 * 16 * 16);                                                                               \
  }

WMMA(bf16, from_bf16)
WMMA(f16, from_f16)

float vgpu_rsqrt(float x) { return 1 / sqrtf(x); }

// AMD v_perm: each selector byte picks one of the eight bytes of a:b, a sign, or a constant.
u32 vgpu_perm(u32 a, u32 b, u32 selectors) {
  uint64_t bytes = (uint64_t)a << 32 | b;
  u32 out = 0;
  for (int i = 0; i < 4; i++) {
    u32 s = selectors >> 8 * i & 255, value;
    if (s < 8) value = bytes >> 8 * s & 255;
    else if (s < 12) value = bytes >> (16 * (s - 8) + 15) & 1 ? 255 : 0;
    else value = s == 12 ? 0 : 255;
    out |= value << 8 * i;
  }
  return out;
}
