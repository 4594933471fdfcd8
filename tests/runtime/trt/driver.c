/* Stands in for libcuda: memory is the host's and everything is done at once, since this is about
   arguments and results alone. Nothing runs on a GPU. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#define OK return 0
typedef uint64_t ptr;
static int depth, held, capturing;
static float clock_ms;
int cuInit(unsigned flags) { return flags; }
int cuDriverGetVersion(int *v) { *v = 13010; OK; }
int cuGetErrorName(int e, const char **s) { *s = e == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : 0; return !*s; }
int cuGetErrorString(int e, const char **s) { *s = e == 2 ? "out of memory" : 0; return !*s; }
int cuDeviceGetCount(int *n) { *n = 1; OK; }
int cuDeviceGet(int *d, int i) { *d = 7; return i ? 101 : 0; }
int cuDeviceGetName(char *s, int n, int d) { strncpy(s, d == 7 ? "Stand-in" : "?", n); OK; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = d == 7 ? (a == 75 ? 8 : a == 76 ? 6 : 0) : -1; OK; }
int cuDeviceTotalMem_v2(size_t *n, int d) { *n = (size_t)12 << 30; OK; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = &held; held++; OK; }
int cuDevicePrimaryCtxRelease_v2(int d) { held--; return d == 7 ? 0 : 101; }
int cuCtxPushCurrent_v2(void *c) { depth++; return c == &held ? 0 : 201; }
int cuCtxPopCurrent_v2(void **c) { depth--; *c = &held; OK; }
int cuMemGetInfo_v2(size_t *f, size_t *t) { *f = (size_t)64 << 20; *t = (size_t)12 << 30; OK; }
int cuMemAlloc_v2(ptr *p, size_t n) { if (n > (1u << 20)) return 2; *p = (ptr)malloc(n); OK; }
int cuMemFree_v2(ptr p) { free((void *)p); OK; }
int cuMemHostAlloc(void **p, size_t n, unsigned f) { *p = malloc(n); return f; }
int cuMemFreeHost(void *p) { free(p); OK; }
int cuMemcpyHtoDAsync_v2(ptr d, const void *h, size_t n, void *s) { memcpy((void *)d, h, n); return s != (void *)0x5157414d; }
int cuMemcpyDtoHAsync_v2(void *h, ptr d, size_t n, void *s) { memcpy(h, (void *)d, n); return s != (void *)0x5157414d; }
int cuStreamCreate(void **s, unsigned f) { *s = (void *)0x5157414d; return f != 1; }
int cuStreamDestroy_v2(void *s) { OK; }
int cuStreamSynchronize(void *s) { OK; }
int cuEventCreate(void **e, unsigned f) { *e = calloc(1, 8); OK; }
int cuEventDestroy_v2(void *e) { free(e); OK; }
int cuEventRecord(void *e, void *s) { *(float *)e = clock_ms += 1.5f; OK; }
int cuEventSynchronize(void *e) { OK; }
int cuEventElapsedTime(float *t, void *a, void *b) { *t = *(float *)b - *(float *)a; OK; }
int cuStreamBeginCapture_v2(void *s, int mode) { capturing = 1; return mode != 1; }
int cuStreamEndCapture(void *s, void **g) { *g = (void *)0x6a; return !capturing--; }
int cuGraphInstantiateWithFlags(void **x, void *g, unsigned long long f) { *x = (void *)0x6b; return g != (void *)0x6a || f; }
int cuGraphLaunch(void *x, void *s) { return x != (void *)0x6b; }
int cuGraphExecDestroy(void *x) { OK; }
int cuGraphDestroy(void *g) { OK; }
int left(void) { return 100 * depth + held; }
