/* The smallest engine: it says when it began, and answers every request, /metrics with llama.cpp's counters. Flags: --port N --stamp FIFO --name TEXT
   --load-ms N (503 until then) --end-after-ms N (code 1). Others are ignored. */
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long long now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static const char *flag(int argc, char **argv, const char *name, const char *otherwise) {
    for (int i = 1; i + 1 < argc; i++)
        if (!strcmp(argv[i], name)) return argv[i + 1];
    return otherwise;
}

static void stamp(const char *path, const char *name, long long began) {
    char line[128]; /* shorter than PIPE_BUF, so lines of many engines do not mix */
    int length = snprintf(line, sizeof line, "%.60s %d %lld\n", name, (int)getpid(), began);
    int fd = open(path, O_WRONLY | O_NONBLOCK);
    if (fd < 0) return;
    if (write(fd, line, length) != length) _exit(2);
    close(fd);
}

static void fail(int number) {
    (void)number;
    _exit(1);
}

int main(int argc, char **argv) {
    static const char good[] = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 15\r\n"
                               "Connection: close\r\n\r\n{\"status\":\"ok\"}";
    static const char wait[] = "HTTP/1.1 503 Loading\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    static const char counters[] = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 64\r\nConnection: close\r\n\r\n"
                                   "llamacpp:n_decode_total 7      \nllamacpp:requests_processing 0 \n";
    long long began = now_ns();
    const char *fifo = flag(argc, argv, "--stamp", NULL);
    if (fifo) stamp(fifo, flag(argc, argv, "--name", "engine"), began);
    signal(SIGPIPE, SIG_IGN);
    long end_after_ms = atol(flag(argc, argv, "--end-after-ms", "0"));
    if (end_after_ms > 0) {
        struct itimerval alarm_at = {.it_value = {end_after_ms / 1000, end_after_ms % 1000 * 1000}};
        signal(SIGALRM, fail);
        setitimer(ITIMER_REAL, &alarm_at, NULL);
    }
    long long ready = began + atoll(flag(argc, argv, "--load-ms", "0")) * 1000000LL;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    address.sin_port = htons((unsigned short)atoi(flag(argc, argv, "--port", "0")));
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), yes = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 64)) {
        perror("cannot listen");
        return 1;
    }
    for (;;) {
        char request[4096];
        int client = accept(listener, NULL, NULL);
        if (client < 0) continue;
        int loaded = now_ns() >= ready;
        if (read(client, request, sizeof request) > 0) {
            int counts = loaded && !strncmp(request, "GET /metrics", 12);
            const char *answer = counts ? counters : loaded ? good : wait;
            if (write(client, answer, strlen(answer)) > 0) shutdown(client, SHUT_WR);
        }
        close(client);
    }
}
