/* The calls of the CUDA runtime that models/cuda_memory.py makes, over files that processes map: a GPU for tests.
 *
 * An allocation is a file in the folder of this library, so a test may read it and tamper with it. A file with one of
 * these names there makes a call fail: no-room, no-export, no-open, crooked.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, NO_ROOM = 2, INVALID_DEVICE = 101, MAPPING_FAILED = 205, NOT_SUPPORTED = 801 };
#define PAGE ((size_t)2 << 20)
#define MOST 64

typedef struct { char reserved[64]; } handle_t;

static struct { char *address; char name[32]; size_t size; } made[MOST];
static int count, last;

static int give(int error) {
    if (error) last = error;
    return error;
}

static void place(char *path, size_t size, const char *name) {
    Dl_info info;
    dladdr((void *)place, &info);
    const char *slash = strrchr(info.dli_fname, '/');
    snprintf(path, size, "%.*s/%s", (int)(slash - info.dli_fname), info.dli_fname, name);
}

static int told_to_fail(const char *name) {
    char path[4096];
    place(path, sizeof path, name);
    return access(path, F_OK) == 0;
}

/* Map a file at an address that is a multiple of a page of the device, which mmap alone does not promise. */
static char *map(int fd, size_t size) {
    char *room = mmap(NULL, size + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED) return NULL;
    char *start = (char *)(((uintptr_t)room + PAGE - 1) / PAGE * PAGE);
    char *mapped = mmap(start, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    return mapped == MAP_FAILED ? NULL : mapped;
}

int cudaSetDevice(int device) { return give(device == 0 ? SUCCESS : INVALID_DEVICE); }

int cudaGetLastError(void) {
    int error = last;
    last = SUCCESS;
    return error;
}

const char *cudaGetErrorString(int error) {
    switch (error) {
    case NO_ROOM: return "out of memory";
    case INVALID_DEVICE: return "invalid device ordinal";
    case MAPPING_FAILED: return "mapping of buffer object failed";
    case NOT_SUPPORTED: return "operation not supported";
    default: return "invalid argument";
    }
}

int cudaMalloc(void **address, size_t size) {
    char path[4096];
    if (told_to_fail("no-room")) return give(NO_ROOM);
    if (told_to_fail("crooked")) {
        *address = malloc(size);
        return give(SUCCESS);
    }
    if (count == MOST) return give(NO_ROOM);
    snprintf(made[count].name, sizeof made[count].name, "memory-%d-%d", getpid(), count);
    place(path, sizeof path, made[count].name);
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, size) != 0) return give(NO_ROOM);
    char *mapped = map(fd, size);
    close(fd);
    if (!mapped) return give(NO_ROOM);
    memset(mapped, 0xA5, size); /* what somebody else left there: CUDA clears nothing */
    made[count].address = mapped;
    made[count++].size = size;
    *address = mapped;
    return give(SUCCESS);
}

int cudaIpcGetMemHandle(handle_t *handle, void *address) {
    if (told_to_fail("no-export")) return give(NOT_SUPPORTED);
    for (int i = 0; i < count; i++)
        if (made[i].address == address) {
            memset(handle, 0, sizeof *handle);
            memcpy(handle->reserved, made[i].name, sizeof made[i].name);
            memcpy(handle->reserved + 32, &made[i].size, sizeof made[i].size);
            return give(SUCCESS);
        }
    return give(INVALID_VALUE);
}

int cudaIpcOpenMemHandle(void **address, handle_t handle, unsigned flags) {
    char path[4096], name[33] = {0};
    size_t size;
    if (flags != 1) return give(INVALID_VALUE);
    if (told_to_fail("no-open")) return give(MAPPING_FAILED);
    memcpy(name, handle.reserved, 32);
    memcpy(&size, handle.reserved + 32, sizeof size);
    place(path, sizeof path, name);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return give(INVALID_VALUE);
    char *mapped = map(fd, size);
    close(fd);
    *address = mapped;
    return give(mapped ? SUCCESS : MAPPING_FAILED);
}
