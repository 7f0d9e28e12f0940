/* Recipe of deft_tvm/plan/planner.py for three groupings: from a forest to one buffer. */
#include <tvm/ffi/c_api.h>

#include "arena.h"
#include "native.h"

static double merge_seconds(Arena *arena, const Walk *walk, const Groups *groups,
                            const Prices *prices) {
  const int32_t *covers = covers_of(arena, walk, groups);
  int64_t partials = 0;
  for (int32_t row = 0; row < walk->num_rows; ++row)
    if (covers[row] > 1) partials += covers[row];
  return (double)partials * prices->partial_seconds + (partials > 0) * prices->launch_seconds;
}

/* Tokens of all paths to nodes with rows of their own. */
static int64_t tokens_of_paths(const Walk *walk) {
  int64_t total = 0;
  for (int32_t i = 0; i < walk->num_nodes; ++i)
    if (walk->own_rows[i]) total += walk->start[i] + walk->length[i];
  return total;
}

enum { PACKED, SEQUENCE, AUTO };

typedef struct {
  Arena arena;
  const Forest *forest;
  const Pages *pages;
  const Prices *prices;
  int64_t grouping;
  int32_t *out;
  int64_t room;
  int64_t *sizes; /* [12 + classes]: the grouping, then see lay_out */
} Call;

typedef struct {
  Groups groups;
  int64_t *chunk; /* where to cut each group */
  double seconds;
} Choice;

static Choice filled(Arena *arena, Groups groups, const Prices *prices) {
  Choice choice = {.groups = groups, .chunk = TAKE(arena, int64_t, groups.count)};
  choice.seconds = fill(arena, prices, &groups, choice.chunk);
  return choice;
}

static Choice by_cost(Arena *arena, const Walk *walk, const Prices *prices) {
  return filled(arena, cut_rows(arena, walk, packed(arena, walk, prices), prices), prices);
}

/* Of both groupings the cheaper. Reading alone mostly settles it. */
static Choice cheaper(Arena *arena, const Walk *walk, const Prices *prices, int64_t *grouping) {
  Choice best = by_cost(arena, walk, prices);
  double seconds = best.seconds + merge_seconds(arena, walk, &best.groups, prices);
  double reading = (double)tokens_of_paths(walk) * prices->token_seconds / (double)prices->cores;
  *grouping = PACKED;
  if (reading >= seconds) return best;
  Choice paths = filled(arena, by_sequence(arena, walk), prices);
  if (paths.seconds >= seconds) return best;
  *grouping = SEQUENCE;
  return paths;
}

enum { OUT_OF_MEMORY = -1, UNCHECKED = -2 };

/* Whether no node is longer than `limits`, to which pages were checked; where there are none,
 * somebody else looks. */
static int checked(const Forest *forest, const Pages *pages, const int64_t *limits) {
  if (forest->num_nodes != pages->num_nodes) return 0;
  int longer = 0;
  for (int64_t i = 0; !pages->is_contiguous && i < forest->num_nodes; ++i)
    longer |= forest->lengths[i] > limits[i];
  return !longer;
}

static int64_t make_plan(Call *call) {
  Arena *arena = &call->arena;
  const Prices *prices = call->prices;
  Walk walk = walk_of(arena, call->forest);
  Choice choice;
  call->sizes[0] = call->grouping;
  if (call->grouping == AUTO)
    choice = cheaper(arena, &walk, prices, &call->sizes[0]);
  else if (call->grouping == PACKED)
    choice = by_cost(arena, &walk, prices);
  else
    choice = filled(arena, by_sequence(arena, &walk), prices);
  Groups groups = cut_tokens(arena, &walk, choice.groups, choice.chunk);
  groups = cut_rows(arena, &walk, groups, prices);
  return lay_out(arena, &walk, &groups, call->forest, call->pages, prices, call->out, call->room,
                 call->sizes);
}

static int64_t unless_out_of_memory(Call *call) {
  return setjmp(call->arena.out_of_memory) ? OUT_OF_MEMORY : make_plan(call);
}

/* plan(forest, pages, limits, prices, grouping, out, room, sizes): the addresses of a structure, a
 * structure, int64[nodes], a structure, int32[room] and int64[12 + classes]. Returns 0, or the room
 * that is needed, or what went wrong. */
__attribute__((visibility("default"))) int __tvm_ffi_plan(void *self, const TVMFFIAny *args,
                                                          int32_t num_args, TVMFFIAny *result) {
  (void)self, (void)num_args;
  Call call = {
      .arena = {0},
      .forest = (const Forest *)args[0].v_int64,
      .pages = (const Pages *)args[1].v_int64,
      .prices = (const Prices *)args[3].v_int64,
      .grouping = args[4].v_int64,
      .out = (int32_t *)args[5].v_int64,
      .room = args[6].v_int64,
      .sizes = (int64_t *)args[7].v_int64,
  };
  const int64_t *limits = (const int64_t *)args[2].v_int64;
  result->type_index = kTVMFFIInt;
  result->v_int64 = UNCHECKED;
  if (checked(call.forest, call.pages, limits)) result->v_int64 = unless_out_of_memory(&call);
  free_arena(&call.arena);
  return 0;
}
