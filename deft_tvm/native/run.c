/* A run of one plan by the kernels of a module: what they read is cut out of the plan's buffer here,
 * where a view costs nothing, and not in Python. */
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

#include "plan_buffer.h"

enum { FIRST_STAGE = 1, SECOND_STAGE = 2, CHECKED = 4 };

/* Arguments of run, before q and what else the kernels take of a layer. */
enum { STAGES, PLAN, LAYOUT, PARTIAL_OUT, PARTIAL_LSE, OUT, LSE, Q };

/* What a tensor must be: a number of dimensions of those sizes, or of what stands for a size. */
typedef struct {
  int64_t code, bits, whole, ndim, shape[4];
} Wanted;
enum { ANY_ROWS = -1, NEEDED_OR_MORE = -2 };

typedef struct {
  const Wanted *wanted; /* of out, lse, q and the operands; the caller's, as long as the module */
  int sinks;
  int32_t num_tiles;
  TVMFFIObjectHandle merge;
  TVMFFIObjectHandle partials[];
} Kernels;

/* A stretch of the plan as a tensor of its own. */
typedef struct {
  DLTensor tensor;
  int64_t shape[2], strides[2];
} View;

typedef struct {
  const DLTensor *plan;
  int64_t at; /* elements that were cut off before */
} Cutter;

static const DLTensor *tensor_of(const TVMFFIAny *any) {
  if (any->type_index == kTVMFFIDLTensorPtr) return any->v_ptr;
  return (const DLTensor *)((const char *)any->v_obj + sizeof(TVMFFIObject));
}

static void *data_of(const DLTensor *tensor) { return (char *)tensor->data + tensor->byte_offset; }

/* The next rows of the plan; columns 0: they are single numbers. */
static TVMFFIAny cut(Cutter *cutter, View *view, int64_t rows, int64_t columns) {
  view->shape[0] = rows;
  view->shape[1] = columns;
  view->strides[0] = columns ? columns : 1;
  view->strides[1] = 1;
  view->tensor = *cutter->plan;
  view->tensor.data = (int32_t *)data_of(cutter->plan) + cutter->at;
  view->tensor.byte_offset = 0;
  view->tensor.ndim = columns ? 2 : 1;
  view->tensor.shape = view->shape;
  view->tensor.strides = view->strides;
  cutter->at += rows * view->strides[0];
  return (TVMFFIAny){.type_index = kTVMFFIDLTensorPtr, .v_ptr = &view->tensor};
}

static int call(TVMFFIObjectHandle kernel, TVMFFIAny *args, int32_t num_args) {
  TVMFFIAny result = {.type_index = kTVMFFINone};
  return TVMFFIFunctionCall(kernel, args, num_args, &result);
}

static int is_whole(const DLTensor *tensor) {
  int whole = 1;
  int64_t size = 1;
  for (int32_t i = tensor->ndim; tensor->strides && i-- > 0; size *= tensor->shape[i])
    whole = whole && (tensor->shape[i] == 1 || tensor->strides[i] == size);
  return whole || size == 0;
}

static int fits(const DLTensor *tensor, const Wanted *wanted, DLDevice device,
                const int64_t *layout) {
  DLDataType dtype = tensor->dtype;
  if (dtype.code != wanted->code || dtype.bits != wanted->bits || dtype.lanes != 1) return 0;
  if (tensor->device.device_type != device.device_type) return 0;
  if (tensor->device.device_id != device.device_id || tensor->ndim != wanted->ndim) return 0;
  for (int32_t i = 0; i < tensor->ndim; ++i) {
    int64_t size = tensor->shape[i], right = wanted->shape[i];
    if (right == ANY_ROWS ? size != layout[ROWS]
                          : right == NEEDED_OR_MORE ? size < layout[NEEDED] : size != right)
      return 0;
  }
  /* Outputs: a GPU writes elements of 16 bits in pairs. */
  if (wanted->whole && device.device_type != kDLCPU && (uintptr_t)data_of(tensor) % 4) return 0;
  if (wanted->whole) return is_whole(tensor);
  return !tensor->strides || tensor->strides[tensor->ndim - 1] == 1;
}

static int all_fit(const Kernels *kernels, const TVMFFIAny *args, int32_t num_args) {
  const int64_t *layout = data_of(tensor_of(&args[LAYOUT]));
  DLDevice device = tensor_of(&args[PLAN])->device;
  for (int32_t i = OUT; i < num_args; ++i)
    if (!fits(tensor_of(&args[i]), &kernels->wanted[i - OUT], device, layout)) return 0;
  return 1;
}

/* run(stages, plan, layout, partial_out, partial_lse, out, lse, q, operands...): whether it ran.
 * With CHECKED it does not where a tensor does not fit. */
static int run(void *self, const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {
  enum { READS = 5, WRITES = 5, MOST_LAYER = 16 };
  const Kernels *kernels = self;
  const int64_t *layout = data_of(tensor_of(&args[LAYOUT]));
  const int64_t *items = layout + ITEMS, stages = args[STAGES].v_int64;
  int32_t layer = num_args - Q; /* q and the operands */
  result->type_index = kTVMFFIBool;
  result->v_int64 = 1;
  if (stages & CHECKED && !all_fit(kernels, args, num_args)) {
    result->v_int64 = 0;
    return 0;
  }
  if (layer > MOST_LAYER) {
    TVMFFIErrorSetRaisedFromCStr("ValueError", "a layer has too many tensors");
    return -1;
  }
  Cutter cutter = {.plan = tensor_of(&args[PLAN])};
  View views[READS + 4];
  TVMFFIAny given[MOST_LAYER + READS + 1 + WRITES];
  memcpy(given, args + Q, (size_t)layer * sizeof *given);
  TVMFFIAny *reads = given + layer;
  reads[0] = cut(&cutter, &views[0], HEADER, 0);
  reads[1] = cut(&cutter, &views[1], layout[PAGES], 0);
  reads[2] = cut(&cutter, &views[2], layout[ROWS], 0);
  reads[3] = cut(&cutter, &views[3], layout[POSITIONS], 0);
  reads[4] = cut(&cutter, &views[4], layout[RUNS], COLUMNS);
  TVMFFIAny *of_tile = reads + READS, *writes = of_tile + 1;
  writes[0] = cut(&cutter, &views[5], layout[DESTS], 0);
  writes[1] = args[OUT];
  writes[2] = args[LSE];
  writes[3] = args[PARTIAL_OUT];
  writes[4] = args[PARTIAL_LSE];
  TVMFFIAny merge_rows = cut(&cutter, &views[6], layout[MERGED], 0);
  TVMFFIAny merge_indptr = cut(&cutter, &views[7], layout[MERGED] + 1, 0);
  int32_t num_given = layer + READS + 1 + WRITES;
  for (int32_t tile = 0; stages & FIRST_STAGE && tile < kernels->num_tiles; ++tile) {
    *of_tile = cut(&cutter, &views[8], items[tile], COLUMNS);
    int failed = items[tile] ? call(kernels->partials[tile], given, num_given) : 0;
    if (failed) return failed;
  }
  if (!(stages & SECOND_STAGE) || !layout[MERGED]) return 0;
  TVMFFIAny merged[7] = {args[PARTIAL_OUT], args[PARTIAL_LSE]};
  int32_t count = 2;
  if (kernels->sinks) merged[count++] = args[num_args - 1];
  merged[count++] = merge_indptr;
  merged[count++] = merge_rows;
  merged[count++] = args[OUT];
  merged[count++] = args[LSE];
  return call(kernels->merge, merged, count);
}

/* The kernels keep their library loaded, and so this function: modules are never unloaded. */
static void release(void *self) {
  Kernels *kernels = self;
  TVMFFIObjectDecRef(kernels->merge);
  for (int32_t tile = 0; tile < kernels->num_tiles; ++tile)
    TVMFFIObjectDecRef(kernels->partials[tile]);
  free(kernels);
}

/* runner(wanted, sinks, merge, partials...): the function run for the kernels of a module. */
__attribute__((visibility("default"))) int __tvm_ffi_runner(void *self, const TVMFFIAny *args,
                                                            int32_t num_args, TVMFFIAny *result) {
  (void)self;
  enum { WANTED, SINKS, MERGE, FIRST_PARTIAL };
  int32_t num_tiles = num_args - FIRST_PARTIAL;
  Kernels *kernels = malloc(sizeof *kernels + (size_t)num_tiles * sizeof(TVMFFIObjectHandle));
  if (!kernels) {
    TVMFFIErrorSetRaisedFromCStr("MemoryError", "no memory is left for a module's kernels");
    return -1;
  }
  kernels->wanted = (const Wanted *)args[WANTED].v_int64;
  kernels->sinks = args[SINKS].v_int64 != 0;
  kernels->num_tiles = num_tiles;
  kernels->merge = args[MERGE].v_obj;
  for (int32_t i = MERGE; i < num_args; ++i) TVMFFIObjectIncRef(args[i].v_obj);
  for (int32_t tile = 0; tile < num_tiles; ++tile)
    kernels->partials[tile] = args[FIRST_PARTIAL + tile].v_obj;
  TVMFFIObjectHandle made = NULL;
  int failed = TVMFFIFunctionCreate(kernels, run, release, &made);
  if (failed) {
    release(kernels);
    return failed;
  }
  result->type_index = kTVMFFIFunction;
  result->v_obj = made;
  return 0;
}
