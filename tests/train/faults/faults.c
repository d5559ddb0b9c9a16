/* Faults of the file system: loaded before libc (LD_PRELOAD), it counts the calls of a process that
 * change something below a folder, and lets one of them fail or kill the process.
 *
 * A write that kills has written half of its bytes. A full disk stays full: every later call that
 * takes room fails as well. Any other error is of one call alone.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[PATH_MAX];
static char calls[4096]; /* a letter for each */
static long counted, fail_at;
static int fault;

/* Count from now on below `path`; the call `at` (from 1; 0: none) fails with `error`, 0: kills. */
void faults_arm(const char *path, long at, int error) {
    snprintf(folder, sizeof folder, "%s", path);
    memset(calls, 0, sizeof calls);
    counted = 0, fail_at = at, fault = error;
}

const char *faults_calls(void) { return calls; }

static int below(const char *path) {
    size_t n = strlen(folder);
    return n && strncmp(path, folder, n) == 0 && (path[n] == '/' || path[n] == 0);
}

static int fd_below(int fd) {
    char link[64], path[PATH_MAX];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

static int place_below(int dir, const char *path) {
    return path[0] == '/' ? below(path) : dir != AT_FDCWD && fd_below(dir);
}

/* Whether this call is the one. */
static int hit(char letter) {
    int takes_room = strchr("owmrs", letter) != NULL;
    if (fault == ENOSPC && !takes_room) return 0;
    long number = __atomic_add_fetch(&counted, 1, __ATOMIC_SEQ_CST);
    if (number < (long)sizeof calls) calls[number - 1] = letter;
    return fail_at && (number == fail_at || (fault == ENOSPC && number > fail_at));
}

static int fails(char letter, int matters) {
    if (!matters || !hit(letter)) return 0;
    if (!fault) kill(getpid(), SIGKILL);
    errno = fault;
    return 1;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPENS(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))
#define MODE() \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0; \
    va_end(rest)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        MODE(); \
        if (fails('o', OPENS(flags) && place_below(AT_FDCWD, path))) return -1; \
        return real(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int dir, const char *path, int flags, ...) { \
        REAL(name); \
        MODE(); \
        if (fails('o', OPENS(flags) && place_below(dir, path))) return -1; \
        return real(dir, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (fd_below(fd) && hit('w')) {
        if (fault) {
            errno = fault;
            return -1;
        }
        real(fd, data, size / 2);
        kill(getpid(), SIGKILL);
    }
    return real(fd, data, size);
}

#define ON_FD(letter, name) \
    int name(int fd) { \
        REAL(name); \
        return fails(letter, fd_below(fd)) ? -1 : real(fd); \
    }
ON_FD('s', fsync)
ON_FD('s', fdatasync)

#define ON_PATH(letter, name, parameters, arguments, dir) \
    int name parameters { \
        REAL(name); \
        return fails(letter, place_below(dir, path)) ? -1 : real arguments; \
    }
ON_PATH('m', mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD)
ON_PATH('m', mkdirat, (int dir, const char *path, mode_t mode), (dir, path, mode), dir)
ON_PATH('u', unlink, (const char *path), (path), AT_FDCWD)
ON_PATH('d', rmdir, (const char *path), (path), AT_FDCWD)
ON_PATH('r', rename, (const char *path, const char *to), (path, to), AT_FDCWD)
ON_PATH('r', renameat, (int dir, const char *path, int other, const char *to),
        (dir, path, other, to), dir)

int unlinkat(int dir, const char *path, int flags) {
    REAL(unlinkat);
    char letter = flags & AT_REMOVEDIR ? 'd' : 'u';
    return fails(letter, place_below(dir, path)) ? -1 : real(dir, path, flags);
}
