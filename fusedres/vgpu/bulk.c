// Copies of boxes between global and shared memory by the tensor memory unit of sm_90 and later, as the PTX ISA has
// them (tensormap.replace, mbarrier, cp.async.bulk.tensor).
//
// A copy is as late as the program allows. To shared memory it arrives when somebody waits for the phase of its
// mbarrier: until then its destination is poison. From shared memory it reads when its group is waited for, and must
// find what was there when it was issued.

#include "runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_RANK = 5, MAX_BARRIERS = 256, ALIGNMENT = 128, SWIZZLES = 4 };

// As tensormap.replace names them (fusedres/vgpu/bulk.py).
enum { ADDRESS, RANK, BOX, SIZE, STRIDE, ELEMENT_STRIDE, TYPE, INTERLEAVE, SWIZZLE, FILL };

// The 128 opaque bytes of a tensor map; dimensions from the innermost out, strides in bytes without the innermost.
typedef struct {
  uint64_t address, strides[MAX_RANK - 1];
  uint32_t box[MAX_RANK], sizes[MAX_RANK], element_strides[MAX_RANK];
  uint8_t rank, type, interleave, swizzle, fill;
} tensor_map;
_Static_assert(sizeof(tensor_map) <= 128, "a tensor map has 128 bytes");

// Bytes of an element by its type; 0 for those that are converted on their way.
static const uint8_t TYPE_BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 0, 8, 2, 0, 0};

typedef struct {
  tensor_map map;
  int32_t at[MAX_RANK];  // element of the tensor where the box begins, inside it or not
  char *shared;
  int bytes, owner, group, site;  // owner: the mbarrier of a load, the thread of a store
  uint64_t seen;                  // by a store, when it was issued
} copy;

typedef struct {
  copy *items;
  int count, room;
} copies;

typedef struct {
  int count, pending, valid;
  int64_t bytes;  // expected and not yet arrived
  uint32_t phase;
} mbarrier;

// What arrived since the last barrier of the block: only warps that waited for it themselves may touch it.
typedef struct {
  const char *shared;
  int bytes, mbarrier;
  uint32_t warps;
} delivery;

struct bulk {
  mbarrier barriers[MAX_BARRIERS];
  int barrier_count;
  copies loads, stores;
  delivery *deliveries;
  int delivered, delivery_room;
  const char **maps;  // tensor maps that were acquired
  int map_count, map_room;
  int group[MAX_LANES];
};

static bulk *mine(void) {
  bulk **place = vgpu_bulk();
  if (!*place) *place = calloc(1, sizeof **place);
  return *place;
}

// The array with room for one more element.
static void *grown(void *items, int count, int *room, size_t bytes) {
  if (count < *room) return items;
  *room = *room ? 2 * *room : 16;
  return realloc(items, *room * bytes);
}

static void push(copies *to, const copy *c) {
  to->items = grown(to->items, to->count, &to->room, sizeof *c);
  to->items[to->count++] = *c;
}

// ---------------------------------------------------------------------------------------------------------- tensor maps

void vgpu_tensormap_replace(int on, char *map, int field, int which, int64_t value, int site) {
  if (!on) return;
  vgpu_shared_becomes(map, ALIGNMENT, ALIGNMENT, site, STORED);
  tensor_map *m = (tensor_map *)map;
  switch (field) {
    case ADDRESS: m->address = value; break;
    case RANK: m->rank = value + 1; break;
    case BOX: m->box[which] = value; break;
    case SIZE: m->sizes[which] = value; break;
    case STRIDE: m->strides[which] = value; break;
    case ELEMENT_STRIDE: m->element_strides[which] = value; break;
    case TYPE: m->type = value; break;
    case INTERLEAVE: m->interleave = value; break;
    case SWIZZLE: m->swizzle = value; break;
    case FILL: m->fill = value; break;
  }
}

typedef struct {
  char *to;
  const char *from;
  int on, site;
} publication;

// A warp writes a tensor map to global memory, where it must be acquired before it is used.
void vgpu_tensormap_publish(call **lanes, int size) {
  const publication *p = lanes[0]->in;
  bulk *b = mine();
  (void)size;
  if (!p->on) return;
  vgpu_shared_looked_at(p->from, ALIGNMENT, ALIGNMENT, p->site);
  if ((uintptr_t)p->to % ALIGNMENT) vgpu_fail(MISALIGNED, p->site, p->to, ALIGNMENT);
  vgpu_global_run(p->to, ALIGNMENT, 1, p->site);
  memcpy(p->to, p->from, ALIGNMENT);
  for (int i = 0; i < b->map_count; i++)
    if (b->maps[i] == p->to) b->maps[i] = 0;
}

void vgpu_tensormap_acquire(int on, const char *map, int site) {
  bulk *b = mine();
  (void)site;
  if (!on) return;
  for (int i = 0; i < b->map_count; i++)
    if (b->maps[i] == map) return;
  b->maps = grown(b->maps, b->map_count, &b->map_room, sizeof *b->maps);
  b->maps[b->map_count++] = map;
}

static int inner_bytes(const tensor_map *m) { return (int)m->box[0] * TYPE_BYTES[m->type]; }

static int rows_of(const tensor_map *m) {
  int rows = 1;
  for (int d = 1; d < m->rank; d++) rows *= m->box[d];
  return rows;
}

#define REQUIRE(holds, ...)                                     \
  do {                                                          \
    if (!(holds)) {                                             \
      char text[160];                                           \
      snprintf(text, sizeof text, __VA_ARGS__);                 \
      vgpu_fail_saying(REFUSED, site, text);                    \
    }                                                           \
  } while (0)

// The map at an address, if the hardware would take it.
static const tensor_map *usable(const char *address, int rank, int site) {
  const tensor_map *m = (const tensor_map *)address;
  bulk *b = mine();
  int acquired = 0;
  for (int i = 0; i < b->map_count; i++) acquired |= b->maps[i] == address;
  if (!acquired) vgpu_fail(NOT_ACQUIRED, site, address, 0);
  REQUIRE(m->rank == rank, "a tensor map of %d dimensions, and the copy has %d", m->rank, rank);
  REQUIRE(m->type < sizeof TYPE_BYTES && TYPE_BYTES[m->type], "a tensor map of element type %d", m->type);
  REQUIRE(!m->interleave && !m->fill && m->swizzle < SWIZZLES, "a tensor map with interleave %d, fill %d, swizzle %d",
          m->interleave, m->fill, m->swizzle);
  REQUIRE(m->address % 16 == 0, "a tensor map of a tensor whose address is not a multiple of 16");
  for (int d = 0; d < rank; d++) {
    REQUIRE(m->box[d] >= 1 && m->box[d] <= 256, "a tensor map whose box has %u elements", m->box[d]);
    REQUIRE(m->sizes[d] >= 1, "a tensor map of a tensor without elements");
    REQUIRE(m->element_strides[d] == 1, "a tensor map with an element stride of %u", m->element_strides[d]);
    REQUIRE(!d || (m->strides[d - 1] % 16 == 0 && m->strides[d - 1] < 1ull << 40),
            "a tensor map with a stride of %llu bytes, which is not a multiple of 16 below 2**40",
            (unsigned long long)m->strides[d ? d - 1 : 0]);
  }
  int inner = inner_bytes(m), widest = m->swizzle ? 16 << m->swizzle : 1 << 30;
  REQUIRE(inner % 16 == 0 && inner <= widest, "a tensor map whose box has rows of %d bytes, with swizzle %d", inner,
          m->swizzle);
  return m;
}

// Where the 16 bytes at this place of a box lie: pieces of a row of 128 bytes are exchanged by the row's number.
static char *swizzled(const tensor_map *m, char *shared, int place) {
  uintptr_t at = (uintptr_t)(shared + place);
  return (char *)(at ^ ((at >> 7 & ((1u << m->swizzle) - 1)) << 4));
}

typedef struct {
  char *global;  // of the first element inside the tensor
  int skipped, inside;  // bytes of the row before it, and inside the tensor from there on
} row;

static row row_of(const copy *c, int number) {
  const tensor_map *m = &c->map;
  int bytes = TYPE_BYTES[m->type], within = 1;
  char *global = (char *)(uintptr_t)m->address;
  for (int d = 1; d < m->rank; d++) {
    int64_t at = (int64_t)c->at[d] + number % (int)m->box[d];
    number /= m->box[d];
    within &= at >= 0 && at < m->sizes[d];
    global += at * (int64_t)m->strides[d - 1];
  }
  int64_t first = c->at[0] < 0 ? -(int64_t)c->at[0] : 0, end = (int64_t)m->sizes[0] - c->at[0];
  if (end > m->box[0]) end = m->box[0];
  if (!within || end <= first) return (row){0, 0, 0};
  return (row){global + (c->at[0] + first) * bytes, (int)first * bytes, (int)(end - first) * bytes};
}

static uint64_t digest(const char *from, int bytes) {
  uint64_t all = 0xcbf29ce484222325u, word;
  for (int i = 0; i < bytes; i += 8) memcpy(&word, from + i, 8), all = (all ^ word) * 0x100000001b3u;
  return all;
}

static copy issued(const char *map, int rank, char *shared, const int32_t *at, int owner, int site) {
  copy c = {.map = *usable(map, rank, site), .shared = shared, .owner = owner, .site = site};
  memcpy(c.at, at, sizeof c.at);
  c.bytes = inner_bytes(&c.map) * rows_of(&c.map);
  if ((uintptr_t)shared % ALIGNMENT) vgpu_fail(MISALIGNED, site, shared, ALIGNMENT);
  vgpu_async_touches(shared, c.bytes, site);
  return c;
}

// ------------------------------------------------------------------------------------------------------------ mbarriers

// What lies in shared memory where an mbarrier is.
static const uint32_t TOKEN = 0x6d626172;

static mbarrier *barrier_at(const char *address, int site) {
  bulk *b = mine();
  uint32_t words[2];
  vgpu_shared_looked_at(address, 8, 8, site);
  memcpy(words, address, 8);
  REQUIRE(words[0] == TOKEN && words[1] < (uint32_t)b->barrier_count, "what is no mbarrier is used as one");
  return &b->barriers[words[1]];
}

void vgpu_mbarrier_init(int on, char *address, int count, int site) {
  bulk *b = mine();
  if (!on) return;
  REQUIRE(count >= 1 && count < 1 << 20, "an mbarrier of %d arrivals", count);
  REQUIRE(b->barrier_count < MAX_BARRIERS, "more than %d mbarriers in a block", MAX_BARRIERS);
  vgpu_shared_becomes(address, 8, 8, site, SET_UP);
  uint32_t words[2] = {TOKEN, (uint32_t)b->barrier_count};
  memcpy(address, words, 8);
  b->barriers[b->barrier_count++] = (mbarrier){.count = count, .pending = count};
}

void vgpu_mbarrier_inval(int on, char *address, int site) {
  if (!on) return;
  mbarrier *m = barrier_at(address, site);
  bulk *b = mine();
  for (int i = 0; i < b->loads.count; i++)
    REQUIRE(&b->barriers[b->loads.items[i].owner] != m, "an mbarrier is made invalid that a copy is to arrive at");
  vgpu_shared_becomes(address, 8, 8, site, SET_UP);
  memset(address, 0xff, 8);
}

static void next_phase(mbarrier *m) { m->phase++, m->pending = m->count; }

void vgpu_mbarrier_arrive(int on, char *address, int count, int bytes, int site) {
  if (!on) return;
  mbarrier *m = barrier_at(address, site);
  REQUIRE(count <= m->pending, "%d arrivals at an mbarrier whose phase expects %d more", count, m->pending);
  m->bytes += bytes, m->pending -= count;
  if (!m->pending && !m->bytes) next_phase(m);
}

// Puts a copy's box into shared memory, zeros where it reaches beyond the tensor.
static void deliver(const copy *c) {
  int inner = inner_bytes(&c->map), rows = rows_of(&c->map);
  char line[256 * 8];
  bulk *b = mine();
  vgpu_shared_becomes(c->shared, c->bytes, 1, c->site, DELIVERED);
  for (int r = 0; r < rows; r++) {
    row from = row_of(c, r);
    memset(line, 0, inner);
    if (from.inside) memcpy(line + from.skipped, from.global, from.inside);
    for (int p = 0; p < inner; p += 16) memcpy(swizzled(&c->map, c->shared, r * inner + p), line + p, 16);
  }
  b->deliveries = grown(b->deliveries, b->delivered, &b->delivery_room, sizeof *b->deliveries);
  b->deliveries[b->delivered++] = (delivery){c->shared, c->bytes, c->owner, 0};
}

// The phase ends if everybody arrived and copies are under way that bring what is missing; they arrive now.
static int finish_phase(mbarrier *m) {
  bulk *b = mine();
  int owner = (int)(m - b->barriers), needed = 0, kept = 0;
  int64_t missing = m->bytes;
  if (m->pending) return 0;
  for (; missing && needed < b->loads.count; needed++)
    if (b->loads.items[needed].owner == owner) missing -= b->loads.items[needed].bytes;
  if (missing) return 0;
  for (int i = 0; i < b->loads.count; i++) {
    copy *c = &b->loads.items[i];
    if (c->owner == owner && i < needed) deliver(c);
    else b->loads.items[kept++] = *c;
  }
  b->loads.count = kept, m->bytes = 0;
  next_phase(m);
  return 1;
}

typedef struct {
  char *address;
  int parity, on, site;
} phase_wait;

// Waits for the end of the phase of this parity: the one under way, unless it has ended already.
void vgpu_mbarrier_wait(call **lanes, int size) {
  const phase_wait *w = lanes[0]->in;
  (void)size;
  if (!w->on) return;
  mbarrier *m = barrier_at(w->address, w->site);
  if ((m->phase & 1) == (uint32_t)w->parity && !finish_phase(m)) {
    vgpu_not_yet();
    return;
  }
  bulk *b = mine();
  for (int i = 0; i < b->delivered; i++)
    if (&b->barriers[b->deliveries[i].mbarrier] == m) b->deliveries[i].warps |= 1u << vgpu_warp();
}

// What a warp that waits at an mbarrier has waited for in vain.
void vgpu_bulk_deadlock(const void *in) {
  const phase_wait *w = in;
  const mbarrier *m = barrier_at(w->address, w->site);
  bulk *b = mine();
  int64_t coming = 0;
  for (int i = 0; i < b->loads.count; i++)
    if (&b->barriers[b->loads.items[i].owner] == m) coming += b->loads.items[i].bytes;
  char text[160];
  snprintf(text, sizeof text, "parity %d at the mbarrier at byte %d of shared memory, whose phase %u lacks %d arrivals "
           "and expects %lld bytes, of which %lld were sent", w->parity, (int)(w->address - vgpu_shared()), m->phase,
           m->pending, (long long)m->bytes, (long long)coming);
  vgpu_fail_saying(DEADLOCK, w->site, text);
}

// ---------------------------------------------------------------------------------------------------------------- copies

#define AT const int32_t at[MAX_RANK] = {c0, c1, c2, c3, c4}

void vgpu_bulk_load(int on, char *shared, const char *map, char *barrier, int rank, int c0, int c1, int c2, int c3,
                    int c4, int site) {
  AT;
  if (!on) return;
  bulk *b = mine();
  copy c = issued(map, rank, shared, at, (int)(barrier_at(barrier, site) - b->barriers), site);
  for (int r = 0; r < rows_of(&c.map); r++) {
    row from = row_of(&c, r);
    if (from.inside) vgpu_global_run(from.global, from.inside, 0, site);
  }
  vgpu_shared_becomes(shared, c.bytes, 1, site, TAKING_OFF);
  memset(shared, 0xff, c.bytes);
  push(&b->loads, &c);
}

void vgpu_bulk_store(int on, const char *map, char *shared, int rank, int c0, int c1, int c2, int c3, int c4, int site) {
  AT;
  if (!on) return;
  bulk *b = mine();
  copy c = issued(map, rank, shared, at, vgpu_thread(), site);
  vgpu_shared_looked_at(shared, c.bytes, 1, site);
  c.group = b->group[vgpu_thread()], c.seen = digest(shared, c.bytes);
  push(&b->stores, &c);
}

static void finish_store(const copy *c) {
  int inner = inner_bytes(&c->map), rows = rows_of(&c->map);
  char line[256 * 8];
  if (digest(c->shared, c->bytes) != c->seen) vgpu_fail_saying(OVERWRITTEN, c->site, "copy");
  // Until here it may have been reading: whoever writes before the next barrier sees it.
  vgpu_shared_looked_at(c->shared, c->bytes, 1, c->site);
  for (int r = 0; r < rows; r++) {
    row to = row_of(c, r);
    if (!to.inside) continue;
    for (int p = 0; p < inner; p += 16) memcpy(line + p, swizzled(&c->map, c->shared, r * inner + p), 16);
    vgpu_global_run(to.global, to.inside, 1, c->site);
    memcpy(to.global, line + to.skipped, to.inside);
  }
}

void vgpu_bulk_commit(int on, int site) {
  (void)site;
  if (on) mine()->group[vgpu_thread()]++;
}

// All but the thread's newest `outstanding` committed groups have been read.
void vgpu_bulk_wait(int on, int outstanding, int site) {
  bulk *b = mine();
  int kept = 0;
  (void)site;
  if (!on) return;
  for (int i = 0; i < b->stores.count; i++) {
    copy *c = &b->stores.items[i];
    if (c->owner == vgpu_thread() && c->group < b->group[vgpu_thread()] - outstanding) finish_store(c);
    else b->stores.items[kept++] = *c;
  }
  b->stores.count = kept;
}

// ------------------------------------------------------------------------------------------------------- for the scheduler

void vgpu_bulk_begin(void) {
  bulk *b = *vgpu_bulk();
  if (!b) return;
  for (int i = 0; i < b->loads.count; i++) vgpu_shared_forgotten(b->loads.items[i].shared, b->loads.items[i].bytes);
  b->barrier_count = b->loads.count = b->stores.count = b->delivered = b->map_count = 0;
  memset(b->group, 0, sizeof b->group);
}

void vgpu_bulk_barrier(void) {
  if (*vgpu_bulk()) (*vgpu_bulk())->delivered = 0;
}

int vgpu_bulk_under_way(void) {
  const bulk *b = *vgpu_bulk();
  return b && b->loads.count + b->stores.count;
}

int vgpu_bulk_delivered_to(const char *address, int warp) {
  const bulk *b = *vgpu_bulk();
  for (int i = b->delivered - 1; i >= 0; i--) {
    const delivery *d = &b->deliveries[i];
    if (address >= d->shared && address < d->shared + d->bytes) return d->warps >> warp & 1;
  }
  return 0;
}
