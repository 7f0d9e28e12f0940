/* Recipe of deft_tvm/plan/planner.py for the groupings "packed" and "auto": from a forest to packed arrays. */
#include <string.h>
#include <tvm/ffi/c_api.h>

#include "arena.h"
#include "native.h"

static double merge_seconds(Arena *arena, const Walk *walk, const Groups *groups,
                            const Prices *prices) {
  int32_t *covers = TAKE(arena, int32_t, walk->num_rows + 1);
  int64_t partials = 0, here = 0;
  memset(covers, 0, ((size_t)walk->num_rows + 1) * sizeof(int32_t));
  for (int32_t g = 0; g < groups->count; ++g) {
    ++covers[groups->row_begin[g]];
    --covers[groups->row_end[g]];
  }
  for (int32_t row = 0; row < walk->num_rows; ++row) {
    here += covers[row];
    if (here > 1) partials += here;
  }
  return (double)partials * prices->partial_seconds + (partials > 0) * prices->launch_seconds;
}

static double fill_groups(Arena *arena, const Groups *groups, const Prices *prices, int64_t *chunk) {
  return fill(arena, prices, groups->tokens, groups->row_begin, groups->row_end, groups->count,
              chunk);
}

/* Tokens of all paths to nodes with rows of their own. */
static int64_t tokens_of_paths(const Walk *walk) {
  int64_t total = 0;
  for (int32_t i = 0; i < walk->num_nodes; ++i)
    if (walk->own_rows[i]) total += walk->start[i] + walk->length[i];
  return total;
}

typedef struct {
  Arena arena;
  const Forest *forest;
  const Pages *pages;
  const Prices *prices;
  int may_repeat; /* "auto": paths may be read one by one, where that is cheaper */
  int32_t *out;
  int64_t room;
  int64_t *sizes; /* whether it is "sequence", then see lay_out */
} Call;

static int64_t make_plan(Call *call) {
  Arena *arena = &call->arena;
  const Prices *prices = call->prices;
  Walk walk = walk_of(arena, call->forest);
  Groups groups = cut_rows(arena, &walk, packed(arena, &walk, prices), prices);
  int64_t *chunk = TAKE(arena, int64_t, groups.count);
  double seconds = fill_groups(arena, &groups, prices, chunk);
  call->sizes[0] = 0;
  if (call->may_repeat) {
    seconds += merge_seconds(arena, &walk, &groups, prices);
    double reading =
        (double)tokens_of_paths(&walk) * prices->token_seconds / (double)prices->cores;
    if (reading < seconds) {
      Groups paths = by_sequence(arena, &walk);
      int64_t *path_chunk = TAKE(arena, int64_t, paths.count);
      if (fill_groups(arena, &paths, prices, path_chunk) < seconds) {
        groups = paths;
        chunk = path_chunk;
        call->sizes[0] = 1;
      }
    }
  }
  groups = cut_rows(arena, &walk, cut_tokens(arena, &walk, groups, chunk), prices);
  return lay_out(arena, &walk, &groups, call->forest, call->pages, prices, call->out, call->room,
                 call->sizes);
}

static int64_t unless_out_of_memory(Call *call) {
  return setjmp(call->arena.out_of_memory) ? -1 : make_plan(call);
}

/* plan(forest, pages, prices, may_repeat, out, room, sizes): the addresses of three structures, of
 * int32[room] and of int64[12 + classes]. Returns 0, or the room that is needed, or -1 where memory
 * ran out. */
__attribute__((visibility("default"))) int __tvm_ffi_plan(void *self, const TVMFFIAny *args,
                                                          int32_t num_args, TVMFFIAny *result) {
  (void)self, (void)num_args;
  Call call = {
      .arena = {0},
      .forest = (const Forest *)args[0].v_int64,
      .pages = (const Pages *)args[1].v_int64,
      .prices = (const Prices *)args[2].v_int64,
      .may_repeat = args[3].v_int64 != 0,
      .out = (int32_t *)args[4].v_int64,
      .room = args[5].v_int64,
      .sizes = (int64_t *)args[6].v_int64,
  };
  result->type_index = kTVMFFIInt;
  result->v_int64 = unless_out_of_memory(&call);
  free_arena(&call.arena);
  return 0;
}
