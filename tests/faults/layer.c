/* A layer between a program and the C library that kills the program, lets a call fail, or stops it, at operations on files.
 *
 * Loaded by LD_PRELOAD, it also sees what libraries in Rust and C++ write. Only paths below one folder count. Python calls
 * fault_arm through ctypes: until then, and below other folders, every call does what it always does.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static long armed_at = -1, count = 0;
static int error_number = 0; /* 0: kill the process; -1: stop it before every operation from armed_at on, until somebody continues it */
static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
static char is_ours[65536];
static int log_descriptor = -1;

/* From now on write every operation to a file: whether it can fail, the call, and the path. */
void fault_log(int descriptor) { log_descriptor = descriptor; }

void fault_arm(const char *folder, long at, int number) {
    snprintf(root, sizeof root, "%s", folder);
    armed_at = at;
    error_number = number;
    count = 0;
}

long fault_count(void) { return count; }

static int is_below(int folder, const char *path) {
    if (!root[0] || !path) return 0;
    if (path[0] != '/' && folder != AT_FDCWD) return folder >= 0 && folder < 65536 && is_ours[folder];
    char whole[PATH_MAX * 2];
    if (path[0] == '/') snprintf(whole, sizeof whole, "%s", path);
    else {
        char here[PATH_MAX];
        if (!getcwd(here, sizeof here)) return 0;
        snprintf(whole, sizeof whole, "%s/%s", here, path);
    }
    return strncmp(whole, root, strlen(root)) == 0;
}

static void note(int writes, const char *call, const char *path, int descriptor) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = dlsym(RTLD_NEXT, "write");
    char link[64], found[PATH_MAX], line[PATH_MAX + 64];
    if (!path) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
        ssize_t size = readlink(link, found, sizeof found - 1);
        found[size < 0 ? 0 : size] = 0;
        path = found;
    }
    int size = snprintf(line, sizeof line, "%d %s %s\n", writes, call, path);
    if (real(log_descriptor, line, size) != size) abort();
}

/* Count an operation; return 1 where it must fail. A full disk stays full, other errors come once. Nothing fails that makes room. */
static int hit(int writes, const char *call, const char *path, int descriptor) {
    if (!root[0]) return 0;
    if (log_descriptor >= 0) {
        pthread_mutex_lock(&one_at_a_time);
        note(writes, call, path, descriptor);
        pthread_mutex_unlock(&one_at_a_time);
    }
    if (error_number < 0) {
        pthread_mutex_lock(&one_at_a_time);
        if (++count >= armed_at) raise(SIGSTOP);
        pthread_mutex_unlock(&one_at_a_time);
        return 0;
    }
    long number = __sync_add_and_fetch(&count, 1);
    if (armed_at < 0) return 0;
    if (!error_number) {
        if (number == armed_at) kill(getpid(), SIGKILL);
        return 0;
    }
    int is_now = error_number == ENOSPC ? number >= armed_at : number == armed_at;
    if (!is_now || !writes) return 0;
    errno = error_number;
    return 1;
}

#define REAL(name, type, ...) static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, name)

static int opened(int descriptor, int below) {
    if (descriptor >= 0 && descriptor < 65536) is_ours[descriptor] = (char)below;
    return descriptor;
}

#define OPEN(NAME, FOLDER, PARAMETERS, CALL) \
    int NAME PARAMETERS { \
        int mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, int); va_end(rest); } \
        int below = is_below(FOLDER, path); \
        int makes = flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC); \
        if (below && makes && hit(1, "open", path, -1)) return -1; \
        return opened(CALL, below); \
    }

static int open_real(const char *path, int flags, int mode) { REAL("open64", int, const char *, int, ...); return real(path, flags, mode); }
static int openat_real(int at, const char *path, int flags, int mode) { REAL("openat64", int, int, const char *, int, ...); return real(at, path, flags, mode); }
OPEN(open, AT_FDCWD, (const char *path, int flags, ...), open_real(path, flags, mode))
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), open_real(path, flags, mode))
OPEN(openat, at, (int at, const char *path, int flags, ...), openat_real(at, path, flags, mode))
OPEN(openat64, at, (int at, const char *path, int flags, ...), openat_real(at, path, flags, mode))

#define FOPEN(NAME) \
    FILE *NAME(const char *path, const char *mode) { \
        REAL("fopen64", FILE *, const char *, const char *); \
        int below = is_below(AT_FDCWD, path); \
        if (below && strpbrk(mode, "wa+") && hit(1, "open", path, -1)) return NULL; \
        FILE *file = real(path, mode); \
        if (file) opened(fileno(file), below); \
        return file; \
    }
FOPEN(fopen)
FOPEN(fopen64)

int close(int descriptor) {
    REAL("close", int, int);
    opened(descriptor, 0);
    return real(descriptor);
}

static int ours(int descriptor) { return descriptor >= 0 && descriptor < 65536 && is_ours[descriptor]; }

/* A write that is killed or stopped has written half. */
ssize_t write(int descriptor, const void *content, size_t size) {
    REAL("write", ssize_t, int, const void *, size_t);
    if (ours(descriptor)) {
        if (error_number < 0) {
            ssize_t half = size > 1 ? real(descriptor, content, size / 2) : 0;
            hit(1, "write", NULL, descriptor);
            ssize_t rest = half < 0 ? half : real(descriptor, (const char *)content + half, size - half);
            return rest < 0 ? rest : half + rest;
        }
        if (armed_at >= 0 && !error_number && count + 1 == armed_at) real(descriptor, content, size / 2);
        if (hit(1, "write", NULL, descriptor)) return -1;
    }
    return real(descriptor, content, size);
}

ssize_t writev(int descriptor, const struct iovec *parts, int number) {
    REAL("writev", ssize_t, int, const struct iovec *, int);
    if (ours(descriptor) && hit(1, "writev", NULL, descriptor)) return -1;
    return real(descriptor, parts, number);
}

ssize_t pwrite64(int descriptor, const void *content, size_t size, off64_t at) {
    REAL("pwrite64", ssize_t, int, const void *, size_t, off64_t);
    if (ours(descriptor) && hit(1, "pwrite64", NULL, descriptor)) return -1;
    return real(descriptor, content, size, at);
}

int ftruncate64(int descriptor, off64_t size) {
    REAL("ftruncate64", int, int, off64_t);
    if (ours(descriptor) && hit(1, "ftruncate64", NULL, descriptor)) return -1;
    return real(descriptor, size);
}

int fsync(int descriptor) {
    REAL("fsync", int, int);
    if (ours(descriptor) && hit(1, "fsync", NULL, descriptor)) return -1;
    return real(descriptor);
}

int rename(const char *from, const char *to) {
    REAL("rename", int, const char *, const char *);
    if (is_below(AT_FDCWD, to) && hit(1, "rename", to, -1)) return -1;
    return real(from, to);
}

int mkdir(const char *path, mode_t mode) {
    REAL("mkdir", int, const char *, mode_t);
    if (is_below(AT_FDCWD, path) && hit(1, "mkdir", path, -1)) return -1;
    return real(path, mode);
}

int unlink(const char *path) {
    REAL("unlink", int, const char *);
    if (is_below(AT_FDCWD, path)) hit(0, "unlink", path, -1);
    return real(path);
}

int unlinkat(int at, const char *path, int flags) {
    REAL("unlinkat", int, int, const char *, int);
    if (is_below(at, path)) hit(0, "unlinkat", path, -1);
    return real(at, path, flags);
}

int rmdir(const char *path) {
    REAL("rmdir", int, const char *);
    if (is_below(AT_FDCWD, path)) hit(0, "rmdir", path, -1);
    return real(path);
}

int chmod(const char *path, mode_t mode) {
    REAL("chmod", int, const char *, mode_t);
    if (is_below(AT_FDCWD, path)) hit(0, "chmod", path, -1);
    return real(path, mode);
}
