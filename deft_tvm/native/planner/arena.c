#include "arena.h"

#include <stdlib.h>

#include "native.h"

enum { ALIGNMENT = 16, FIRST_BLOCK = 1 << 16 };

void give_up(Arena *arena) { longjmp(arena->out_of_memory, 1); }

static void add_block(Arena *arena, size_t bytes) {
  size_t size = arena->size ? 2 * arena->size : FIRST_BLOCK;
  while (size < bytes + ALIGNMENT) size *= 2;
  char *block = malloc(size);
  if (!block) give_up(arena);
  *(char **)block = arena->block;
  arena->block = block;
  arena->used = ALIGNMENT;
  arena->size = size;
}

void *take(Arena *arena, size_t count, size_t size) {
  size_t bytes = (count * size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  if (arena->size - arena->used < bytes) add_block(arena, bytes);
  void *found = arena->block + arena->used;
  arena->used += bytes;
  return found;
}

void free_arena(Arena *arena) {
  while (arena->block) {
    char *before = *(char **)arena->block;
    free(arena->block);
    arena->block = before;
  }
}
