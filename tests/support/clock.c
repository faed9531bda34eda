/* Moves the clock of a process, for whichever library asks: by as many seconds as CLOCK_MOVED says. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static time_t moved(void) { return (time_t)atoll(getenv("CLOCK_MOVED")); }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*next)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = next(clock, now);
    if (!failed && clock == CLOCK_REALTIME) now->tv_sec += moved();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    int (*next)(struct timeval *, void *) = dlsym(RTLD_NEXT, "gettimeofday");
    int failed = next(now, zone);
    if (!failed) now->tv_sec += moved();
    return failed;
}

time_t time(time_t *result) {
    time_t (*next)(time_t *) = dlsym(RTLD_NEXT, "time");
    time_t now = next(NULL) + moved();
    if (result) *result = now;
    return now;
}
