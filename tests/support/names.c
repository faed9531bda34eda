/* Notes the names that a process looks up, whichever library asks. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>

typedef int (*lookup)(const char *, const char *, const struct addrinfo *, struct addrinfo **);

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints, struct addrinfo **result) {
    lookup next = (lookup)dlsym(RTLD_NEXT, "getaddrinfo");
    FILE *file = fopen(getenv("NAMES_ASKED"), "a");
    if (file) {
        fprintf(file, "%s\n", name ? name : "-");
        fclose(file);
    }
    return next(name, service, hints, result);
}
