// The threads of a GPU on a CPU: one fiber per thread, warps that meet, blocks that wait at barriers.
//
// A compiled kernel calls into this file wherever the GPU would do more than arithmetic: for every access to global and
// shared memory, at every barrier, and where the lanes of a warp exchange values. A warp's lanes run one after another
// up to the next such meeting; when the last has arrived, the operation is done for all of them at once. Warps run in
// an order that the caller chooses, blocks on as many cores as it grants.

#define _GNU_SOURCE
#include "runtime.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

enum { STACK_BYTES = 256 << 10 };

// ---------------------------------------------------------------------------------------------------- what is counted

typedef struct {
  char *base;
  int64_t bytes;
  uint32_t *readers, *writers;  // per byte: block + 1 that touched it, MANY for several readers; null when not counted
  int32_t fresh;                // never written before this launch, so that nothing may be read before it is written
} region;

enum { MANY = 0xffffffffu };

typedef struct {
  int64_t sectors, ideal_sectors;  // 32-byte pieces of global memory touched, and the fewest that hold the same bytes
} traffic;

typedef struct {
  int64_t shared_passes, ideal_shared_passes, tensor_ops, tensor_macs, barriers;
} counters;

typedef struct {
  int32_t kind, site, block, thread, other;  // `other`: the warp or block that was there before
  int64_t address;
  char text[160];
} failure;

typedef struct {
  void (*kernel)(void *);
  void *arguments;
  int32_t grid[3], threads, warp_size, order, shared_bytes, workers, counted;
  int32_t region_count;
  region *regions;
  traffic *traffic;  // per region
  counters total;
  failure failure;
  atomic_long next_block;
  atomic_int stopped;
  pthread_mutex_t lock;
} launch;

// ------------------------------------------------------------------------------------------------------------- fibers

typedef struct {
  const char *address;
  int32_t site;
  int16_t bytes;
  uint8_t shared;
} access;

typedef struct {
  char *destination;
  const char *source;
  int32_t bytes, filled, group;
} copy;

// BLOCKED: the warp's lanes have met for an operation that must wait for what other warps do.
typedef enum { RUNNING, MEETING, BLOCKED, WAITING, DONE } lane_state;

typedef struct {
  void *stack_pointer;
  char *stack;
  lane_state state;
  meeting_op op;
  call call;
  int barrier_site;
  access *log;
  int logged, log_room;
  copy *copies;
  int copying, copy_room, copy_group;
} lane;

// An asynchronous multiplication that reads shared memory until it is waited for: what it read when it was issued.
typedef struct {
  operand a, b;
  int has_a, group;
  uint64_t seen;
} pending_mma;

typedef struct {
  pending_mma *pending;
  int count, room, group;
  uint32_t fenced, before;  // when it last put a fence between proxies, and at the last barrier before that
} warp;

// Marks of shared memory, per byte: epoch << 8 | warp + 1 of the last writer and reader. Barriers part epochs, and each
// block begins a new one. A reader's SEVERAL stands for several warps, a writer's BULK for a copy that is not a warp's.
// FLYING is later than every epoch.
enum { BULK = 0xfe, SEVERAL = 0xff };
static const uint32_t FLYING = 0xffffffff;

typedef struct worker {
  launch *launch;
  lane lanes[MAX_LANES], *current;
  warp warps[MAX_LANES / 32];
  void *host;
  int block[3], block_id, last_region;
  char *shared;
  uint32_t *writers, *readers;  // the marks of shared memory
  uint32_t epoch, born;         // now, and when the block began
  // Stores reach what is read and written asynchronously (the other proxy) only through a fence. Per byte: when it was
  // last stored to, of a clock that goes on at fences and barriers; 0 if it was not by a store.
  uint32_t *stored, clock, barrier;  // `barrier`: the clock at the last one
  uint32_t covered, covering;        // stores before this are seen by all; and will be after the next barrier
  int not_yet, hopeless;
  bulk *bulk;
  traffic *traffic;
  counters counters;
} worker;

static __thread worker *me __attribute__((tls_model("initial-exec")));

// Saves the caller's registers and stack pointer in *from and continues where `to` was saved.
void vgpu_switch(void **from, void *to);
__asm__(
    ".text\n.globl vgpu_switch\n.type vgpu_switch,@function\nvgpu_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
    ".size vgpu_switch,.-vgpu_switch\n");

static int index_of(const lane *l) { return (int)(l - me->lanes); }
static int warp_of(const lane *l) { return index_of(l) / me->launch->warp_size; }

// Records the first failure of the launch. Not inlined into callers, whose fast paths should stay small.
static __attribute__((noinline)) void record(int kind, int site, const void *address, int other, const char *text) {
  launch *run = me->launch;
  pthread_mutex_lock(&run->lock);
  if (!run->failure.kind) {
    failure *f = &run->failure;
    f->kind = kind, f->site = site, f->block = me->block_id, f->thread = index_of(me->current), f->other = other;
    f->address = (int64_t)(intptr_t)address;
    if (text) strncpy(f->text, text, sizeof f->text - 1);
  }
  pthread_mutex_unlock(&run->lock);
  atomic_store(&run->stopped, 1);
}

// Gives the block up: its fibers are never resumed.
static __attribute__((noinline, noreturn)) void give_up(int kind, int site, const void *address, int other,
                                                        const char *text) {
  void *abandoned;
  record(kind, site, address, other, text);
  vgpu_switch(&abandoned, me->host);
  __builtin_unreachable();
}

void vgpu_fail(int kind, int site, const void *address, int other) { give_up(kind, site, address, other, 0); }
void vgpu_fail_saying(int kind, int site, const char *text) { give_up(kind, site, 0, 0, text); }
void vgpu_refuse(const char *what) { give_up(UNSUPPORTED, -1, 0, 0, what); }

static void flush_log(int w);

// The warp of `last` has no lane left that could run. True if its lanes met and may go on.
static int settle(lane *last) {
  int size = me->launch->warp_size, w = warp_of(last);
  lane *lanes = &me->lanes[w * size];
  flush_log(w);
  for (int i = 1; i < size; i++)
    if (lanes[i].state != lanes[0].state || (lanes[i].state == MEETING && lanes[i].op != lanes[0].op) ||
        (lanes[i].state == WAITING && lanes[i].barrier_site != lanes[0].barrier_site)) {
      record(DIVERGENT, lanes[i].state == WAITING ? lanes[i].barrier_site : -1, 0, w, 0);
      return 0;
    }
  if (lanes[0].state == DONE && me->warps[w].count) record(NOT_WAITED_FOR, -1, 0, w, "multiplication");
  if (lanes[0].state != MEETING && lanes[0].state != BLOCKED) return 0;
  call *calls[MAX_WARP];
  for (int i = 0; i < size; i++) calls[i] = &lanes[i].call;
  me->not_yet = 0;
  lanes[0].op(calls, size);
  for (int i = 0; i < size; i++) lanes[i].state = me->not_yet ? BLOCKED : RUNNING;
  return !me->not_yet;
}

// The operation that a warp has met for can not be done yet: it is tried again when other warps have gone on.
void vgpu_not_yet(void) { me->not_yet = 1; }

// The current lane waits or has ended: the next lane of its warp runs, or all of them once they have met.
static void give_way(void) {
  lane *self = me->current, *first = &me->lanes[warp_of(self) * me->launch->warp_size];
  lane *next = self + 1;
  if (next == first + me->launch->warp_size) {
    while (!settle(self)) {
      int blocked = self->state == BLOCKED;
      vgpu_switch(&self->stack_pointer, me->host);
      if (!blocked) return;
      if (me->hopeless) vgpu_bulk_deadlock(self->call.in);
    }
    next = first;
  }
  me->current = next;
  if (next != self) vgpu_switch(&self->stack_pointer, next->stack_pointer);
}

void vgpu_meet(meeting_op op, const void *in, void *out) {
  lane *self = me->current;
  self->op = op, self->call = (call){in, out}, self->state = MEETING;
  give_way();
}

void vgpu_barrier(int site) {
  me->current->state = WAITING, me->current->barrier_site = site;
  give_way();
}

static void lane_main(void) {
  me->launch->kernel(me->launch->arguments);
  me->current->state = DONE;
  give_way();
  __builtin_unreachable();
}

int vgpu_thread(void) { return index_of(me->current); }
bulk **vgpu_bulk(void) { return &me->bulk; }
int vgpu_block(int axis) { return me->block[axis]; }
int vgpu_blocks(int axis) { return me->launch->grid[axis]; }
// AMD passes the numbers of blocks along each axis, and other things that no kernel of Triton's asks for, in memory.
const void *vgpu_implicit_arguments(void) { return me->launch->grid; }
char *vgpu_shared(void) { return me->shared; }
int vgpu_lane(void) { return index_of(me->current) % me->launch->warp_size; }

// ------------------------------------------------------------------------------------------------------ memory, global

static void log_access(const char *address, int bytes, int site, int shared) {
  if (!me->launch->counted) return;
  lane *self = me->current;
  if (self->logged == self->log_room) {
    self->log_room = self->log_room ? 2 * self->log_room : 256;
    self->log = realloc(self->log, self->log_room * sizeof *self->log);
  }
  self->log[self->logged++] = (access){address, site, (int16_t)bytes, (uint8_t)shared};
}

static int holds(const region *r, const char *address, int bytes) {
  return address >= r->base && address + bytes <= r->base + r->bytes;
}

static int region_of(const char *address, int bytes) {
  const launch *run = me->launch;
  if (me->last_region < run->region_count && holds(&run->regions[me->last_region], address, bytes))
    return me->last_region;
  for (int r = 0; r < run->region_count; r++)
    if (holds(&run->regions[r], address, bytes)) return me->last_region = r;
  return -1;
}

static region *checked(const char *address, int bytes, int align, int site) {
  int r = region_of(address, bytes);
  if (r < 0) vgpu_fail(OUT_OF_BOUNDS, site, address, bytes);
  if ((uintptr_t)address & (align - 1)) vgpu_fail(MISALIGNED, site, address, align);
  return &me->launch->regions[r];
}

// Two blocks may come to a byte at the same time, on two cores. Each leaves its mark before it looks for that of the
// other, both by an exchange that no later load overtakes, so that at least one of them sees the other.
static void mark_reader(_Atomic uint32_t *reader, uint32_t self) {
  uint32_t before = atomic_load_explicit(reader, memory_order_relaxed);
  if (before == self || before == MANY) return;
  if (before || (before = atomic_exchange(reader, self))) {
    if (before != self) atomic_exchange(reader, MANY);
  }
}

static void touch_read(const char *address, int bytes, int align, int site) {
  region *r = checked(address, bytes, align, site);
  if (!r->readers) return;
  uint32_t self = me->block_id + 1, *readers = r->readers + (address - r->base),
           *writers = r->writers + (address - r->base);
  int fresh = r->fresh, unmarked = 0, odd = 0;
  for (int i = 0; i < bytes; i++) unmarked |= readers[i] != self && readers[i] != MANY;
  if (unmarked)
    for (int i = 0; i < bytes; i++) mark_reader((_Atomic uint32_t *)&readers[i], self);
  atomic_signal_fence(memory_order_seq_cst);
  for (int i = 0; i < bytes; i++) odd |= writers[i] != self && (writers[i] || fresh);
  if (!odd) return;
  for (int i = 0; i < bytes; i++) {
    if (writers[i] && writers[i] != self) vgpu_fail(BLOCK_RACE, site, address + i, (int)writers[i] - 1);
    if (!writers[i] && fresh) vgpu_fail(NEVER_WRITTEN, site, address + i, 0);
  }
}

static void touch_written(const char *address, int bytes, int align, int site) {
  region *r = checked(address, bytes, align, site);
  if (!r->readers) return;
  uint32_t self = me->block_id + 1, *readers = r->readers + (address - r->base),
           *writers = r->writers + (address - r->base);
  int unmarked = 0, odd = 0;
  for (int i = 0; i < bytes; i++) unmarked |= writers[i] != self;
  if (unmarked)
    for (int i = 0; i < bytes; i++) {
      uint32_t before = atomic_exchange((_Atomic uint32_t *)&writers[i], self);
      if (before && before != self) vgpu_fail(BLOCK_RACE, site, address + i, (int)before - 1);
    }
  for (int i = 0; i < bytes; i++) odd |= readers[i] && readers[i] != self;
  if (!odd) return;
  for (int i = 0; i < bytes; i++)
    if (readers[i] && readers[i] != self)
      vgpu_fail(BLOCK_RACE, site, address + i, readers[i] == MANY ? -1 : (int)readers[i] - 1);
}

void vgpu_global_read(const char *address, int bytes, int align, int site) {
  touch_read(address, bytes, align, site);
  log_access(address, bytes, site, 0);
}

void vgpu_global_write(const char *address, int bytes, int align, int site) {
  touch_written(address, bytes, align, site);
  log_access(address, bytes, site, 0);
}

// AMD's buffers: an offset beyond the end is no access at all. Triton makes all of them as long as offsets reach, and
// sends a lane that is masked off to the one offset just behind them; any other offset out there is a mistake.
enum { BUFFER_BYTES = 0x7ffffffe };
static const uint32_t MASKED_OFF = 0x80000000u;

const char *vgpu_make_buffer(const char *base, int stride, int64_t bytes) {
  if (stride || bytes != BUFFER_BYTES) vgpu_refuse("a buffer with a stride, or of another size than 2**31 - 2 bytes");
  return base;
}

const char *vgpu_in_buffer(const char *base, uint32_t offset, uint32_t scalar_offset, int bytes, int site) {
  uint64_t at = (uint64_t)offset + scalar_offset;
  if (at + bytes <= BUFFER_BYTES) return base + at;
  if (offset != MASKED_OFF) vgpu_fail(OUT_OF_BOUNDS, site, base + (int32_t)(offset + scalar_offset), bytes);
  return 0;
}

// A lane whose predicate is off takes part in a warp's access without an address.
void vgpu_idle(int site) { log_access(0, 0, site, 0); }

// ------------------------------------------------------------------------------------------------------ memory, shared

static int64_t shared_place(const char *address, int bytes, int align, int site) {
  if (address < me->shared || address + bytes > me->shared + me->launch->shared_bytes)
    vgpu_fail(SHARED_OUT_OF_BOUNDS, site, address, bytes);
  if ((uintptr_t)address & (align - 1)) vgpu_fail(MISALIGNED, site, address, align);
  return address - me->shared;
}

static int warp_there(uint32_t mark) { return (mark & 0xff) == SEVERAL ? -1 : (int)(mark & 0xff) - 1; }

// A bulk copy has arrived for the warps that have waited for it, and after the next barrier for all.
static int is_in_flight(uint32_t mark, const char *address) {
  return mark == FLYING ||
         (mark == (me->epoch << 8 | BULK) && !vgpu_bulk_delivered_to(address, warp_of(me->current)));
}

// The loops without a way out are for the vector units; only if one of their bytes is odd is it looked for.
static void shared_reading(const char *address, int bytes, int align, int site) {
  int64_t place = shared_place(address, bytes, align, site);
  uint32_t *writers = me->writers + place, *readers = me->readers + place, now = me->epoch << 8, born = me->born << 8;
  uint32_t self = now | (uint32_t)(warp_of(me->current) + 1);
  int odd = 0;
  for (int i = 0; i < bytes; i++) {
    odd |= (writers[i] != self) & (writers[i] - born >= now - born);
    readers[i] = readers[i] == self || readers[i] < now ? self : now | SEVERAL;
  }
  if (!odd) return;
  for (int i = 0; i < bytes; i++) {
    if (writers[i] == self) continue;
    if (is_in_flight(writers[i], address + i)) vgpu_fail(IN_FLIGHT, site, address + i, 0);
    if (writers[i] < born) vgpu_fail(SHARED_NEVER_WRITTEN, site, address + i, 0);
    if (writers[i] >= now && writers[i] != (now | BULK)) vgpu_fail(SHARED_RACE, site, address + i, warp_there(writers[i]));
  }
}

// `source` is null when the bytes are not there yet. Two warps may write the same bytes to the same place.
static void shared_writing(const char *address, const char *source, int bytes, int align, int site, int how) {
  int64_t place = shared_place(address, bytes, align, site);
  uint32_t *writers = me->writers + place, *readers = me->readers + place, now = me->epoch << 8;
  uint32_t self = now | (uint32_t)(warp_of(me->current) + 1);
  uint32_t left = how == TAKING_OFF ? FLYING : how == DELIVERED ? now | BULK : self;
  uint32_t *stored = me->stored + place, when = how == STORED ? me->clock : 0;
  int odd = 0, lands = how == LANDING || how == DELIVERED;
  for (int i = 0; i < bytes; i++) {
    odd |= (writers[i] != self) & (writers[i] >= now) & !lands;
    odd |= (readers[i] != self) & (readers[i] >= now);
  }
  for (int i = 0; odd && i < bytes; i++) {
    if (!lands && is_in_flight(writers[i], address + i)) vgpu_fail(IN_FLIGHT, site, address + i, 0);
    if (source && source[i] == address[i]) continue;
    if (!lands && writers[i] != self && writers[i] >= now && writers[i] != (now | BULK))
      vgpu_fail(SHARED_RACE, site, address + i, warp_there(writers[i]));
    if (readers[i] != self && readers[i] >= now) vgpu_fail(SHARED_RACE, site, address + i, warp_there(readers[i]));
  }
  for (int i = 0; i < bytes; i++) writers[i] = left, stored[i] = when;
}

void vgpu_shared_read(const char *address, int bytes, int align, int site) {
  shared_reading(address, bytes, align, site);
  log_access(address, bytes, site, 1);
}

void vgpu_shared_write(char *address, const char *source, int bytes, int align, int site) {
  shared_writing(address, source, bytes, align, site, STORED);
  log_access(address, bytes, site, 1);
  memcpy(address, source, bytes);
}

// ------------------------------------------------------------------------------------------------ asynchronous copies

// `filled` of `bytes` come from global memory, the others are zero. Until it is waited for, the destination is poison.
void vgpu_copy(char *destination, const char *source, int bytes, int filled, int site) {
  lane *self = me->current;
  if (filled > 0) touch_read(source, filled, bytes, site);
  log_access(filled > 0 ? source : 0, filled > 0 ? filled : 0, site, 0);
  shared_writing(destination, 0, bytes, bytes, site, TAKING_OFF);
  log_access(destination, bytes, site, 1);
  memset(destination, 0xff, bytes);
  if (self->copying == self->copy_room) {
    self->copy_room = self->copy_room ? 2 * self->copy_room : 64;
    self->copies = realloc(self->copies, self->copy_room * sizeof *self->copies);
  }
  self->copies[self->copying++] = (copy){destination, source, bytes, filled, self->copy_group};
}

void vgpu_copy_commit(void) { me->current->copy_group++; }

// All but the newest `outstanding` committed groups have arrived.
void vgpu_copy_wait(int outstanding) {
  lane *self = me->current;
  int kept = 0;
  for (int i = 0; i < self->copying; i++) {
    copy c = self->copies[i];
    if (c.group >= self->copy_group - outstanding) {
      self->copies[kept++] = c;
      continue;
    }
    shared_writing(c.destination, 0, c.bytes, 1, -1, LANDING);
    memset(c.destination, 0, c.bytes);
    if (c.filled > 0) memcpy(c.destination, c.source, c.filled);
  }
  self->copying = kept;
}

void vgpu_copy_wait_all(void) {
  me->current->copy_group++;
  vgpu_copy_wait(0);
}

// --------------------------------------------------------------------------------------------------------------- proxies

// Lanes meet at it, so that it comes after what any of them has stored.
void vgpu_fence_async(call **lanes, int size) {
  (void)lanes, (void)size;
  warp *w = &me->warps[warp_of(me->current)];
  w->fenced = ++me->clock, w->before = me->covering = me->barrier;
}

// What is read or overwritten asynchronously must have been stored before a fence, of the warp that stored it or of one
// that a barrier had shown it to.
void vgpu_async_touches(const char *address, int bytes, int site) {
  int64_t place = shared_place(address, bytes, 1, site);
  const uint32_t *stored = me->stored + place, *writers = me->writers + place;
  uint32_t before = me->warps[warp_of(me->current)].before, odd = 0;
  if (before < me->covered) before = me->covered;
  for (int i = 0; i < bytes; i++) odd |= stored[i] >= before;
  for (int i = 0; odd && i < bytes; i++)
    if (stored[i] >= before && me->warps[(writers[i] & 0xff) - 1].fenced <= stored[i])
      vgpu_fail(UNFENCED, site, address + i, 0);
}

// For copies of boxes (bulk.c).

void vgpu_global_run(const char *address, int64_t bytes, int written, int site) {
  (written ? touch_written : touch_read)(address, (int)bytes, 1, site);
  if (!me->launch->counted) return;
  traffic *t = &me->traffic[region_of(address, (int)bytes)];
  t->sectors += ((intptr_t)address + bytes - 1) / 32 - (intptr_t)address / 32 + 1;
  t->ideal_sectors += (bytes + 31) / 32;
}

void vgpu_shared_looked_at(const char *address, int bytes, int align, int site) {
  shared_reading(address, bytes, align, site);
}

void vgpu_shared_becomes(char *address, int bytes, int align, int site, int how) {
  shared_writing(address, 0, bytes, align, site, how);
}

void vgpu_shared_forgotten(const char *address, int bytes) {
  memset(&me->writers[address - me->shared], 0, bytes * sizeof *me->writers);
}

// ----------------------------------------------------------------------------------------------------- multiplications

void vgpu_matrix_read(const char *address, int bytes) { shared_reading(address, bytes, 1, -1); }

// Rows of a small matrix, accessed together.
static void count_rows(const char *const *rows, int count, int bytes) {
  int passes = 0;
  uint8_t deep[32] = {0};
  for (int i = 0; i < count; i++)
    for (int b = 0; b < bytes; b += 4) {
      int bank = (int)((uintptr_t)(rows[i] + b) / 4 % 32), again = 0;
      for (int j = 0; j < i; j++) again |= rows[j] == rows[i];
      if (!again && ++deep[bank] > passes) passes = deep[bank];
    }
  me->counters.shared_passes += passes, me->counters.ideal_shared_passes += 1;
}

void vgpu_rows_read(const char *const *rows, int count, int bytes) {
  for (int i = 0; i < count; i++) shared_reading(rows[i], bytes, bytes, -1);
  count_rows(rows, count, bytes);
}

void vgpu_rows_write(char *const *rows, const char (*data)[16], int count) {
  for (int i = 0; i < count; i++) {
    shared_writing(rows[i], data[i], 16, 16, -1, STORED);
    memcpy(rows[i], data[i], 16);
  }
  count_rows((const char *const *)rows, count, 16);
}

void vgpu_count_tensor(int64_t macs) { me->counters.tensor_ops++, me->counters.tensor_macs += macs; }

int vgpu_warp(void) { return warp_of(me->current); }

void vgpu_pending_add(const operand *a, const operand *b, uint64_t seen) {
  warp *w = &me->warps[warp_of(me->current)];
  if (w->count == w->room) {
    w->room = w->room ? 2 * w->room : 16;
    w->pending = realloc(w->pending, w->room * sizeof *w->pending);
  }
  pending_mma *p = &w->pending[w->count++];
  *p = (pending_mma){.b = *b, .has_a = a != 0, .group = w->group, .seen = seen};
  if (a) p->a = *a;
}

void vgpu_pending_commit(void) { me->warps[warp_of(me->current)].group++; }

void vgpu_pending_wait(int outstanding) {
  warp *w = &me->warps[warp_of(me->current)];
  int kept = 0;
  for (int i = 0; i < w->count; i++) {
    pending_mma p = w->pending[i];
    if (p.group >= w->group - outstanding)
      w->pending[kept++] = p;
    // Until here it may have been reading: as reads of now they are seen by whoever writes before the next barrier.
    else if (vgpu_operands_digest(p.has_a ? &p.a : 0, &p.b) != p.seen)
      vgpu_fail_saying(OVERWRITTEN, -1, "multiplication");
  }
  w->count = kept;
}

// -------------------------------------------------------------------------------------------------- accesses of a warp

static int ascending(const void *a, const void *b) {
  uintptr_t x = *(const uintptr_t *)a, y = *(const uintptr_t *)b;
  return (x > y) - (x < y);
}

static int distinct(uintptr_t *keys, int count) {
  int sorted = 1, kept = 0;
  for (int i = 1; i < count; i++) sorted &= keys[i - 1] <= keys[i];
  if (!sorted) qsort(keys, count, sizeof *keys, ascending);
  for (int i = 0; i < count; i++)
    if (!kept || keys[kept - 1] != keys[i]) keys[kept++] = keys[i];
  return kept;
}

static void count_global(access **group, int count) {
  uintptr_t sectors[MAX_WARP * 2], starts[MAX_WARP];
  int n = 0, bytes = group[0]->bytes;
  for (int i = 0; i < count; i++) {
    uintptr_t at = (uintptr_t)group[i]->address;
    starts[i] = at;
    for (uintptr_t s = at / 32; s <= (at + bytes - 1) / 32; s++) sectors[n++] = s;
  }
  int r = region_of(group[0]->address, bytes);
  if (r < 0) return;
  me->traffic[r].sectors += distinct(sectors, n);
  me->traffic[r].ideal_sectors += ((int64_t)distinct(starts, count) * bytes + 31) / 32;
}

// Accesses of 8 and 16 bytes are served for half and for a quarter of a warp at a time.
static void count_shared(access **group, int count) {
  int bytes = group[0]->bytes, share = bytes > 4 ? MAX_WARP / 2 * 4 / bytes : 32;
  for (int begin = 0; begin < count; begin += share) {
    uintptr_t words[32 * 4];
    uint8_t deep[32] = {0};
    int n = 0, end = begin + share < count ? begin + share : count, passes = 0;
    for (int i = begin; i < end; i++)
      for (int b = 0; b < bytes; b += 4) words[n++] = ((uintptr_t)group[i]->address + b) / 4;
    n = distinct(words, n);
    for (int i = 0; i < n; i++)
      if (++deep[words[i] % 32] > passes) passes = deep[words[i] % 32];
    me->counters.shared_passes += passes, me->counters.ideal_shared_passes += (n + 31) / 32;
  }
}

// Lanes log what they touch; here the entries of one instruction come together again. Lanes that took another branch
// have other sites, and form accesses of their own.
static void flush_log(int w) {
  int size = me->launch->warp_size, at[MAX_WARP] = {0};
  lane *lanes = &me->lanes[w * size];
  if (!me->launch->counted) return;
  for (;;) {
    int site = 0, found = 0, count = 0;
    uint8_t shared = 0;
    access *group[MAX_WARP];
    for (int i = 0; i < size; i++) {
      if (at[i] == lanes[i].logged) continue;
      access *a = &lanes[i].log[at[i]];
      if (!found) found = 1, site = a->site, shared = a->shared;
      if (a->site != site || a->shared != shared) continue;
      at[i]++;
      if (a->bytes) group[count++] = a;
    }
    if (!found) break;
    if (count) (shared ? count_shared : count_global)(group, count);
  }
  for (int i = 0; i < size; i++) lanes[i].logged = 0;
}

// -------------------------------------------------------------------------------------------------------------- blocks

static void prepare_lane(lane *l) {
  if (!l->stack)
    l->stack = mmap(0, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
#ifdef __SANITIZE_ADDRESS__
  // A lane that a fault ended never returned from its functions, whose frames are still marked.
  __asan_unpoison_memory_region(l->stack, STACK_BYTES);
#endif
  void **top = (void **)(l->stack + STACK_BYTES);
  *--top = 0;
  *--top = (void *)lane_main;
  top -= 6;
  memset(top, 0, 6 * sizeof *top);
  l->stack_pointer = top, l->state = RUNNING, l->logged = l->copying = l->copy_group = 0;
}

// Blocks of one launch come after one another in the shadow of shared memory too.
static void next_epoch(void) {
  if (++me->epoch >= (1u << 24) - 1) {
    // The marks of a block that is under way are lost, once in millions of barriers.
    memset(me->writers, 0, SHARED_BYTES * sizeof *me->writers);
    memset(me->readers, 0, SHARED_BYTES * sizeof *me->readers);
    me->epoch = 1, me->born = 0;
  }
}

// What lanes had not waited for when their block ended: the next block begins with nothing under way.
static void forget_copies(void) {
  for (int i = 0; i < me->launch->threads; i++) {
    lane *l = &me->lanes[i];
    for (int c = 0; c < l->copying; c++)
      vgpu_shared_forgotten(l->copies[c].destination, l->copies[c].bytes);
    l->copying = 0;
  }
}

// The order in which warps run up to the next barrier, a function of the launch's order, the block, and the barrier.
static void order_warps(int *order, int warps, int round) {
  int chosen = me->launch->order;
  for (int i = 0; i < warps; i++) order[i] = chosen == 1 ? warps - 1 - i : i;
  if (chosen < 2) return;
  uint64_t state = ((uint64_t)chosen << 40 ^ (uint64_t)me->block_id << 16 ^ (uint64_t)round) * 0x9e3779b97f4a7c15u;
  for (int i = warps - 1; i > 0; i--) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    int j = (int)((state >> 33) % (uint64_t)(i + 1)), swapped = order[i];
    order[i] = order[j], order[j] = swapped;
  }
}

// Every warp runs until it waits at a barrier or has ended. False if something failed.
static int run_warps(const int *order, int warps) {
  int size = me->launch->warp_size, blocked, went_on;
  me->hopeless = 0;
  do {
    blocked = went_on = 0;
    for (int i = 0; i < warps; i++) {
      lane *first = &me->lanes[order[i] * size];
      lane_state before = first->state;
      if (before != RUNNING && before != BLOCKED) continue;
      me->current = before == BLOCKED ? first + size - 1 : first;
      vgpu_switch(&me->host, me->current->stack_pointer);
      if (atomic_load(&me->launch->stopped)) return 0;
      blocked += first->state == BLOCKED;
      went_on += before == RUNNING || first->state != BLOCKED;
    }
    me->hopeless = !went_on;
  } while (blocked);
  return 1;
}

static void run_block(void) {
  launch *run = me->launch;
  int warps = run->threads / run->warp_size;
  next_epoch();
  me->born = me->epoch;
  memset(me->shared, 0xff, run->shared_bytes);
  for (int i = 0; i < run->threads; i++) prepare_lane(&me->lanes[i]);
  for (int w = 0; w < warps; w++) me->warps[w].count = me->warps[w].group = 0;
  vgpu_bulk_begin();
  me->covered = me->covering = me->barrier = ++me->clock;
  for (int round = 0;; round++) {
    int order[MAX_LANES / 32], waiting = 0;
    order_warps(order, warps, round);
    if (!run_warps(order, warps)) return;
    for (int w = 0; w < warps; w++) waiting += me->lanes[w * run->warp_size].state == WAITING;
    if (!waiting) {
      if (vgpu_bulk_under_way()) record(NOT_WAITED_FOR, -1, 0, 0, "copy");
      return;
    }
    me->counters.barriers++;
    for (int w = 0; w < warps; w++) {
      lane *l = &me->lanes[w * run->warp_size];
      if (l->state != WAITING || l->barrier_site != me->lanes[0].barrier_site) {
        me->current = l;
        record(DIVERGENT, l->state == WAITING ? l->barrier_site : me->lanes[0].barrier_site, 0, w, 0);
        return;
      }
    }
    for (int i = 0; i < run->threads; i++) me->lanes[i].state = RUNNING;
    next_epoch();
    vgpu_bulk_barrier();
    me->covered = me->covering, me->barrier = ++me->clock;
  }
}

static worker *new_worker(void) {
  worker *w = calloc(1, sizeof *w);
  // In the lowest 2 GiB, since a kernel keeps shared addresses in 32 bits; aligned, since matrix descriptors keep 18.
  char *low = mmap(0, 2 * SHARED_BYTES, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT | MAP_NORESERVE, -1, 0);
  if (low == MAP_FAILED) {
    free(w);
    return 0;
  }
  w->shared = (char *)(((uintptr_t)low + SHARED_BYTES - 1) & ~(uintptr_t)(SHARED_BYTES - 1));
  w->writers = calloc(SHARED_BYTES, sizeof *w->writers);
  w->readers = calloc(SHARED_BYTES, sizeof *w->readers);
  w->stored = calloc(SHARED_BYTES, sizeof *w->stored);
  return w;
}

static pthread_mutex_t idle_lock = PTHREAD_MUTEX_INITIALIZER;
static worker *idle[256];
static int idle_count;

static worker *take_worker(void) {
  pthread_mutex_lock(&idle_lock);
  worker *w = idle_count ? idle[--idle_count] : 0;
  pthread_mutex_unlock(&idle_lock);
  return w ? w : new_worker();
}

static void give_worker(worker *w) {
  pthread_mutex_lock(&idle_lock);
  if (idle_count < 256) idle[idle_count++] = w;
  pthread_mutex_unlock(&idle_lock);
}

static void *work(void *argument) {
  launch *run = argument;
  worker *previous = me;
  me = take_worker();
  if (!me) {
    atomic_store(&run->stopped, 1);
    run->failure.kind = UNSUPPORTED;
    strcpy(run->failure.text, "no memory below 2 GiB for the shared memory of a block");
    me = previous;
    return 0;
  }
  me->launch = run, me->last_region = 0;
  me->traffic = calloc(run->region_count + 1, sizeof *me->traffic);
  memset(&me->counters, 0, sizeof me->counters);
  long blocks = (long)run->grid[0] * run->grid[1] * run->grid[2];
  for (;;) {
    long b = atomic_fetch_add(&run->next_block, 1);
    if (b >= blocks || atomic_load(&run->stopped)) break;
    if (run->order == 1) b = blocks - 1 - b;
    me->block_id = (int)b;
    me->block[0] = b % run->grid[0], me->block[1] = b / run->grid[0] % run->grid[1];
    me->block[2] = b / run->grid[0] / run->grid[1];
    run_block();
    forget_copies();
  }
  pthread_mutex_lock(&run->lock);
  for (int r = 0; r < run->region_count; r++) {
    run->traffic[r].sectors += me->traffic[r].sectors;
    run->traffic[r].ideal_sectors += me->traffic[r].ideal_sectors;
  }
  for (size_t i = 0; i < sizeof(counters) / sizeof(int64_t); i++)
    ((int64_t *)&run->total)[i] += ((int64_t *)&me->counters)[i];
  pthread_mutex_unlock(&run->lock);
  free(me->traffic);
  give_worker(me);
  me = previous;
  return 0;
}

// Runs a launch to its end or first failure, whose kind it returns (0 is none).
int vgpu_run(launch *run) {
  pthread_t threads[256];
  int started = 0, extra = run->workers < 256 ? run->workers - 1 : 255;
  pthread_mutex_init(&run->lock, 0);
  for (; started < extra; started++)
    if (pthread_create(&threads[started], 0, work, run)) break;
  work(run);
  for (int i = 0; i < started; i++) pthread_join(threads[i], 0);
  pthread_mutex_destroy(&run->lock);
  return run->failure.kind;
}

size_t vgpu_launch_bytes(void) { return sizeof(launch); }

// ------------------------------------------------------------------------------------------------------------- buffers

enum { PAGE = 4096, GUARD = 1 << 20 };

static size_t pages(int64_t bytes) { return ((size_t)bytes + 64 + PAGE - 1) / PAGE * PAGE; }

// Memory that ends where a page nobody may touch begins, and begins `phase` bytes past a multiple of 64.
char *vgpu_guarded(int64_t bytes, int64_t phase) {
  size_t inner = pages(bytes);
  char *outer = mmap(0, inner + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (outer == MAP_FAILED) return 0;
  mprotect(outer + GUARD, inner, PROT_READ | PROT_WRITE);
  uintptr_t last = (uintptr_t)outer + GUARD + inner - (uintptr_t)bytes;
  return (char *)(((last - phase) & ~(uintptr_t)63) + phase);
}

void vgpu_release(char *base, int64_t bytes) {
  size_t inner = pages(bytes);
  uintptr_t end = ((uintptr_t)base + (uintptr_t)bytes + PAGE - 1) / PAGE * PAGE;
  munmap((char *)(end - inner - GUARD), inner + 2 * GUARD);
}
