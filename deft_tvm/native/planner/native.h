/* The planner of deft_tvm/plan/planner.py, compiled: the groupings "packed", "sequence" and the
 * cheaper of the two, without a window. Each file is named after the Python file that it repeats;
 * there every step is explained, and tests hold both to the same plans, bit for bit.
 *
 * Nodes are places in the depth-first walk, tokens 64 bits wide, seconds doubles. Memory is taken
 * from an arena that ends with the call. */
#ifndef DEFT_TVM_NATIVE_H
#define DEFT_TVM_NATIVE_H

#include <stddef.h>
#include <stdint.h>

/* The three structures that Python fills; deft_tvm/plan/compiled.py has the same fields. */

typedef struct { /* Forest: one entry a node in the caller's order, row_order one a row */
  int64_t num_nodes, num_rows;
  const int32_t *parents, *lengths, *rows, *preorder, *position, *subtree_end;
  const int32_t *row_begin, *row_end, *row_order, *start, *diagonal;
} Forest;

typedef struct { /* PageTable */
  int64_t num_nodes, is_contiguous, page_shift, num_pages, max_page;
  const int32_t *page_indices, *page_indptr, *first_slot;
} Pages;

typedef struct { /* Prices: [classes], and the seconds [classes][most_rows + 1] */
  int64_t classes, cores, most_rows, row_step, longest, joins;
  const int64_t *kv_tile, *cut_steps, *units;
  const double *step_seconds, *fixed_seconds;
  double token_seconds, partial_seconds, launch_seconds;
} Prices;

/* arena.c */
typedef struct Arena Arena;
void *take(Arena *arena, size_t count, size_t size);
void give_up(Arena *arena); /* as where no memory is left */
#define TAKE(arena, type, count) ((type *)take(arena, (size_t)(count), sizeof(type)))

/* walk.c */
typedef struct {
  int32_t num_nodes, num_rows;
  int32_t *node, *parent, *subtree_end, *row_begin, *row_end, *own_rows;
  int64_t *length, *diagonal, *start;
} Walk;
Walk walk_of(Arena *arena, const Forest *forest);

/* cost.c */
typedef struct {
  int32_t tile;
  int64_t units;
  double seconds; /* of one unit */
} Price;
Price choose_tile(const Prices *prices, int64_t tokens, int64_t rows);
Price price_in(const Prices *prices, int32_t tile, int64_t tokens, int64_t rows);
Price units_of(const Prices *prices, int64_t tokens, int64_t rows);
double cost(const Prices *prices, int64_t tokens, int64_t rows, double balanced);
double makespan(Price *units, Price *scratch, int32_t count, int64_t cores); /* sorts them */
/* The time of units of tile classes that run one class after another; room for `count` each. */
double by_class(const Prices *prices, const Price *units, int32_t count, Price *one_class,
                Price *scratch);

/* clusters.c */
typedef struct {
  const Walk *walk;
  int32_t count;
  int32_t *begin, *end, *parent, *row_begin, *row_end, *own_rows;
  int64_t *tokens;
  double *cost;
  double balanced;
} Clusters;
Clusters contract(Arena *arena, const Walk *walk, const Prices *prices);

/* split.c */
typedef struct {
  int32_t count, pieces;
  int32_t *node;        /* [pieces] */
  int64_t *begin, *end; /* [pieces] */
  int32_t *indptr;      /* [count + 1] */
  int32_t *row_begin, *row_end;
  int64_t *tokens; /* [count] */
} Groups;
static inline int32_t group_rows(const Groups *groups, int32_t g) {
  return groups->row_end[g] - groups->row_begin[g];
}
Groups take_groups(Arena *arena, int64_t count, int64_t pieces);
void add_node(Groups *groups, const Walk *walk, int32_t node);
void close_group(Groups *groups, int32_t row_begin, int32_t row_end); /* unless it is empty */
int32_t *covers_of(Arena *arena, const Walk *walk, const Groups *groups); /* of each row */
Groups by_sequence(Arena *arena, const Walk *walk);
Groups cut_tokens(Arena *arena, const Walk *walk, Groups groups, const int64_t *chunk);
Groups cut_rows(Arena *arena, const Walk *walk, Groups groups, const Prices *prices);

/* joins.c */
char *hand_down(Arena *arena, const Clusters *clusters, const Prices *prices); /* NULL: none */
Groups by_cluster(Arena *arena, const Clusters *clusters, const char *joins, char **mergeable);

/* packed.c */
Groups packed(Arena *arena, const Walk *walk, const Prices *prices);

/* fill.c */
double fill(Arena *arena, const Prices *prices, const Groups *groups, int64_t *chunk);

/* layout.c */
int64_t lay_out(Arena *arena, const Walk *walk, const Groups *groups, const Forest *forest,
                const Pages *pages, const Prices *prices, int32_t *out, int64_t room,
                int64_t *sizes);

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; } /* a ≥ 0 */

#endif
