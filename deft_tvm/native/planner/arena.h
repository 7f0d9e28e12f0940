/* Memory that ends with the call: blocks that are freed together. */
#ifndef DEFT_TVM_ARENA_H
#define DEFT_TVM_ARENA_H

#include <setjmp.h>
#include <stddef.h>

struct Arena {
  char *block; /* whose first word names the block before it */
  size_t used, size;
  jmp_buf out_of_memory;
};

void free_arena(struct Arena *arena);

#endif
