// What the scheduler (runtime.c), the operations of a warp (warp.c) and copies of boxes (bulk.c) know of each other.

#ifndef FUSEDRES_VGPU_RUNTIME_H
#define FUSEDRES_VGPU_RUNTIME_H

#include <stdint.h>

// What one lane brings to a meeting of its warp, and where it takes the result.
typedef struct {
  const void *in;
  void *out;
} call;

typedef void (*meeting_op)(call **lanes, int size);

// A matrix in shared memory as a warpgroup multiplication names it: rows x depth elements of `bytes` bytes.
typedef struct {
  uint64_t descriptor;
  int first_row, rows, depth, bytes, transposed;
} operand;

enum { SHARED_BYTES = 256 << 10, MAX_LANES = 1024, MAX_WARP = 64 };

// What can fail, by the numbers of run.py.
enum {
  OUT_OF_BOUNDS = 1, NEVER_WRITTEN, BLOCK_RACE, SHARED_OUT_OF_BOUNDS, SHARED_RACE, IN_FLIGHT, DIVERGENT, OVERWRITTEN,
  MISALIGNED, UNSUPPORTED, SHARED_NEVER_WRITTEN, NOT_WAITED_FOR, UNFENCED, DEADLOCK, REFUSED, NOT_ACQUIRED,
};

// How bytes come to shared memory: stored, set up as an mbarrier (which compilers put no fence after), as a copy under
// way, as a thread's own copy that was waited for, as a bulk copy whose mbarrier was.
enum { STORED, SET_UP, TAKING_OFF, LANDING, DELIVERED };

typedef struct bulk bulk;

void vgpu_fail(int kind, int site, const void *address, int other) __attribute__((noreturn));
void vgpu_fail_saying(int kind, int site, const char *text) __attribute__((noreturn));
void vgpu_refuse(const char *what);
void vgpu_not_yet(void);
char *vgpu_shared(void);
int vgpu_warp(void);
int vgpu_thread(void);
bulk **vgpu_bulk(void);
void vgpu_global_run(const char *address, int64_t bytes, int written, int site);
void vgpu_shared_looked_at(const char *address, int bytes, int align, int site);
void vgpu_shared_becomes(char *address, int bytes, int align, int site, int how);
void vgpu_shared_forgotten(const char *address, int bytes);
void vgpu_async_touches(const char *address, int bytes, int site);
void vgpu_matrix_read(const char *address, int bytes);
void vgpu_rows_read(const char *const *rows, int count, int bytes);
void vgpu_rows_write(char *const *rows, const char (*data)[16], int count);
void vgpu_count_tensor(int64_t macs);
void vgpu_pending_add(const operand *a, const operand *b, uint64_t seen);
void vgpu_pending_commit(void);
void vgpu_pending_wait(int outstanding);
uint64_t vgpu_operands_digest(const operand *a, const operand *b);

// bulk.c, as the scheduler calls it: when a block begins and ends, and when all its warps met at a barrier.
void vgpu_bulk_begin(void);
void vgpu_bulk_barrier(void);
int vgpu_bulk_under_way(void);
int vgpu_bulk_delivered_to(const char *address, int warp);
void vgpu_bulk_deadlock(const void *wait) __attribute__((noreturn));

#endif
