// What the scheduler (runtime.c) and the operations of a warp (warp.c) know of each other.

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

char *vgpu_shared(void);
int vgpu_warp(void);
void vgpu_refuse(const char *what);
void vgpu_matrix_read(const char *address, int bytes);
void vgpu_rows_read(const char *const *rows, int count, int bytes);
void vgpu_rows_write(char *const *rows, const char (*data)[16], int count);
void vgpu_count_tensor(int64_t macs);
void vgpu_pending_add(const operand *a, const operand *b, uint64_t seen);
void vgpu_pending_commit(void);
void vgpu_pending_wait(int outstanding);
uint64_t vgpu_operands_digest(const operand *a, const operand *b);

#endif
