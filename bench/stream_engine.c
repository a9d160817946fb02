/* An engine that costs next to nothing: chats are answered at once or token by token, everything else as engine.c does, over
   connections that are kept. Flags: --port N --token-ms N (0: all tokens at once) --tokens N --in-step 1 (the tokens of all
   streams are due at the same moments, as of one batch). Others are ignored. One thread, one epoll, one timer. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define MOST_CONNECTIONS 8192
#define REQUEST_BYTES 16384
#define TOKEN                                                                                                          \
    "data: {\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"bench-model\"," \
    "\"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"},\"finish_reason\":null}]}\n\n"
#define DONE "data: [DONE]\n\n"
#define CHAT                                                                                                            \
    "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1700000000,\"model\":\"bench-model\",\"choices\":"  \
    "[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"Yes.\"},\"finish_reason\":\"stop\"}],"               \
    "\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":2,\"total_tokens\":11}}"
#define HEALTHY "{\"status\":\"ok\"}"
#define COUNTERS "llamacpp:n_decode_total 7\nllamacpp:requests_processing 0\n"
#define SSE_HEAD "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

struct connection {
    int fd, streaming, sent; /* sent: tokens of the stream so far */
    long long due;           /* when the next one is, CLOCK_MONOTONIC in ns */
    size_t have;
    char in[REQUEST_BYTES];
};

static struct connection *streams[MOST_CONNECTIONS];
static int streaming, poller, timer, tokens, in_step;
static long long period;

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

static void end_stream(struct connection *c) {
    for (int i = 0; c->streaming && i < streaming; i++)
        if (streams[i] == c) {
            streams[i] = streams[--streaming];
            c->streaming = 0;
        }
}

static void end(struct connection *c) {
    end_stream(c);
    close(c->fd);
    free(c);
}

/* 0 when the client has gone, or reads so slowly that this little does not fit. */
static int say(struct connection *c, const char *what, size_t length) {
    return send(c->fd, what, length, MSG_NOSIGNAL) == (ssize_t)length;
}

static int say_whole(struct connection *c, const char *type, const char *body) {
    char answer[2048];
    int length = snprintf(answer, sizeof answer, "HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %zu\r\n\r\n%s", type,
                          strlen(body), body);
    return say(c, answer, length);
}

static size_t chunk(char *into, const char *event) {
    return sprintf(into, "%zx\r\n%s\r\n", strlen(event), event);
}

/* The tokens that are due, in one write, behind the head when it is the first. */
static int say_tokens(struct connection *c, const char *head, long long now) {
    static char out[1 << 20];
    size_t length = strlen(head);
    memcpy(out, head, length);
    while (c->sent < tokens && c->due <= now && length < sizeof out - 1024) {
        length += chunk(out + length, TOKEN);
        c->sent++;
        c->due += period;
    }
    if (c->sent == tokens) {
        length += chunk(out + length, DONE);
        length += sprintf(out + length, "0\r\n\r\n");
        end_stream(c);
    }
    return length == 0 || say(c, out, length);
}

static int begin_stream(struct connection *c) {
    long long now = now_ns();
    if (streaming == MOST_CONNECTIONS) return 0;
    streams[streaming++] = c;
    c->streaming = 1;
    c->sent = 0;
    c->due = in_step && period ? (now / period + 1) * period : now;
    return say_tokens(c, SSE_HEAD, now);
}

/* The answer to a request; 0 when the connection cannot be used on. */
static int answer(struct connection *c, const char *body) {
    if (!strncmp(c->in, "POST /v1/chat/completions", 25))
        return strstr(body, "\"stream\":true") ? begin_stream(c) : say_whole(c, "application/json", CHAT);
    if (!strncmp(c->in, "GET /metrics", 12)) return say_whole(c, "text/plain", COUNTERS);
    return say_whole(c, "application/json", HEALTHY);
}

static int take(struct connection *c) {
    ssize_t got = recv(c->fd, c->in + c->have, REQUEST_BYTES - 1 - c->have, MSG_DONTWAIT);
    if (got <= 0) return 0;
    c->have += got;
    c->in[c->have] = 0;
    char *body = strstr(c->in, "\r\n\r\n");
    if (body == NULL) return c->have < REQUEST_BYTES - 1;
    const char *length = strcasestr(c->in, "\r\nContent-Length:");
    size_t whole = body + 4 - c->in + (length && length < body ? strtoul(length + 17, NULL, 10) : 0);
    if (whole > REQUEST_BYTES - 1) return 0;
    if (c->have < whole) return 1;
    c->have = 0; /* nobody here sends a second request before the answer to the first */
    return answer(c, body + 4);
}

static void welcome(int listener) {
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), yes = 1;
    struct connection *c = fd < 0 ? NULL : calloc(1, sizeof *c);
    if (c == NULL) return;
    c->fd = fd;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
}

/* What is due is sent; the timer is set for what is due next. */
static void tick(void) {
    long long now = now_ns(), next = 0;
    for (int i = streaming - 1; i >= 0; i--) { /* downwards: one that ends is replaced by the last one */
        struct connection *c = streams[i];
        if (c->due <= now && !say_tokens(c, "", now)) shutdown(c->fd, SHUT_RDWR); /* its end is read, and handled there */
        if (c->streaming && (!next || c->due < next)) next = c->due;
    }
    struct itimerspec at = {.it_value = {next / 1000000000LL, next % 1000000000LL}};
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL);
}

static int listen_at(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    address.sin_port = htons((unsigned short)port);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), yes = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 4096)) {
        perror("cannot listen");
        exit(1);
    }
    return listener;
}

int main(int argc, char **argv) {
    struct rlimit files;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    prctl(PR_SET_TIMERSLACK, 1UL);
    tokens = atoi(flag(argc, argv, "--tokens", "10"));
    period = atoll(flag(argc, argv, "--token-ms", "0")) * 1000000LL;
    in_step = atoi(flag(argc, argv, "--in-step", "0"));
    int listener = listen_at(atoi(flag(argc, argv, "--port", "0")));
    poller = epoll_create1(EPOLL_CLOEXEC);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = &listener};
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
    event.data.ptr = &timer;
    epoll_ctl(poller, EPOLL_CTL_ADD, timer, &event);
    for (;;) {
        struct epoll_event found[128];
        int count = epoll_wait(poller, found, 128, -1);
        for (int i = 0; i < count; i++) {
            struct connection *c = found[i].data.ptr;
            if (found[i].data.ptr == &listener) welcome(listener);
            else if (found[i].data.ptr != &timer && !take(c)) end(c);
        }
        if (count > 0) tick();
    }
}
