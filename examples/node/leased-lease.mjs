// One lease, and the time contract that its holder keeps.
//
// A holder must stop before the daemon may let another holder in. So the holder computes its
// deadline by its own clock, and on the early side:
//
//     deadline = sentAt + remaining - margin
//
// After a grant without `waited`, `remaining` is the TTL.
// `sentAt` is read just before a request is sent, and is used once the daemon has confirmed that
// request. The time of the answer is not used, since the answer may have been delayed. For the same
// reason a holder does not rely on a grant from the queue (`waited`) before a touch is confirmed.
//
// No lease can stop a process that is paused in the middle of its work: send `lease.token` with
// every write.

import { randomUUID } from 'node:crypto';
import { performance } from 'node:perf_hooks';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const proto = protoLoader.loadSync('leased/v1/lease.proto', {
  includeDirs: [fileURLToPath(new URL('../../proto', import.meta.url))],
  longs: String, // a token is a 64-bit integer
  enums: String,
  defaults: true,
  oneofs: true,
});
const { LeaseService } = grpc.loadPackageDefinition(proto).leased.v1;

// Notices a dead connection and reconnects well within a TTL.
const CHANNEL_OPTIONS = {
  'grpc.keepalive_time_ms': 5_000,
  'grpc.keepalive_timeout_ms': 2_000,
  'grpc.initial_reconnect_backoff_ms': 200,
  'grpc.max_reconnect_backoff_ms': 1_000,
};

const { status } = grpc;
// After these codes the outcome is unknown. The call is repeated with the same lease id.
const UNKNOWN_OUTCOME = new Set([
  status.UNAVAILABLE,
  status.DEADLINE_EXCEEDED,
  status.UNKNOWN,
  status.INTERNAL,
  status.CANCELLED,
]);

/** Returns a client of the daemon at `endpoint`, for any number of leases. */
export function connect(endpoint) {
  return new LeaseService(endpoint, grpc.credentials.createInsecure(), CHANNEL_OPTIONS);
}

/** Another client holds the key, even after the wait. */
export class Held extends Error {}

/** The lease is over, or cannot be relied on. */
export class Lost extends Error {}

/**
 * One acquisition of one key: `acquire`, then work until `lost` (an AbortSignal) is aborted, then
 * `release`.
 * Times are in milliseconds.
 */
export class Lease {
  token = null;
  #client;
  #request;
  #ttl;
  #wait;
  #margin;
  #id = null;
  #unanswered = false; // an acquire with this id had no answer, and may still arrive at a daemon
  #deadline = null;
  #lost = new AbortController();
  #confirm;
  #confirmed = new Promise((resolve) => (this.#confirm = resolve));
  #call = null;
  #tasks = [];

  constructor(client, key, { owner = '', ttl = 10_000, wait = 0 } = {}) {
    this.key = key;
    this.#client = client;
    this.#request = { key, owner, ttl: duration(ttl) };
    this.#ttl = ttl;
    this.#wait = wait;
    // Covers the drift between two clocks, and the time that stopping takes.
    this.#margin = ttl / 10;
  }

  /** Aborted when the work must stop; its `reason` is a `Lost`. */
  get lost() {
    return this.#lost.signal;
  }

  /** For how many milliseconds the lease may be relied on. If 0, do not act on the key. */
  get remaining() {
    const believed = this.#deadline !== null && !this.lost.aborted;
    return believed ? Math.max(0, this.#deadline - performance.now()) : 0;
  }

  /**
   * Waits for the lease, begins to keep it alive, and returns its fencing token. Throws `Held` if
   * another client holds the key for longer than `wait`, `Lost` if the lease was closed or lost
   * meanwhile, and gRPC's error if a retry cannot help.
   */
  async acquire() {
    const { sentAt, granted } = await this.#requestGrant();
    this.token = BigInt(granted.fencingToken);
    if (!granted.waited) this.#believe(sentAt + milliseconds(granted.ttl));
    this.#tasks = [this.#keepAlive(), this.#watch()];
    await this.#confirmed;
    this.lost.throwIfAborted();
    return this.token;
  }

  /**
   * Releases the lease, or leaves the queue, and ends all tasks of this object. Returns false if the
   * lease was not held any more, or if no daemon answered. In the second case the next waiter waits
   * until the lease expires.
   */
  async release() {
    this.close();
    await Promise.all(this.#tasks);
    const giveUp = performance.now() + this.#ttl;
    for (let pause = 100; this.#id !== null; pause = Math.min(2 * pause, 1_000)) {
      try {
        await this.#unary('Release', { lease: this.#ref() }, 5_000);
        return true;
      } catch (error) {
        if (!UNKNOWN_OUTCOME.has(error.code) || performance.now() + pause > giveUp) break;
      }
      await sleep(pause);
    }
    return false;
  }

  /** Ends the work and every wait at once, without a call to the daemon. */
  close() {
    this.#end('closed');
  }

  /**
   * Repeats the acquire until it is answered. Requests share one id, and so one queue entry, unless
   * its lease has ended.
   */
  async #requestGrant() {
    const giveUp = performance.now() + this.#wait;
    this.#id = randomUUID();
    for (let pause = 100; !this.lost.aborted; pause = Math.min(2 * pause, 1_000)) {
      const wait = Math.max(0, giveUp - performance.now());
      const request = { ...this.#request, leaseId: this.#id, wait: duration(wait) };
      const sentAt = performance.now();
      try {
        return { sentAt, granted: await this.#unary('Acquire', request, wait + 5_000, this.lost) };
      } catch (error) {
        this.#unanswered ||= UNKNOWN_OUTCOME.has(error.code);
        if (this.lost.aborted) break;
        if (error.code === status.ALREADY_EXISTS) throw new Held(error.details);
        // NOT_FOUND: an earlier request was granted, and its lease has ended: use a new id.
        if (error.code === status.NOT_FOUND) [this.#id, this.#unanswered] = [randomUUID(), false];
        else if (!UNKNOWN_OUTCOME.has(error.code) || performance.now() > giveUp + this.#ttl) throw error;
      }
      await nap(pause, this.lost);
    }
    throw this.lost.reason;
  }

  /** Opens one keepalive stream after the other, until the lease ends. */
  async #keepAlive() {
    while (!this.lost.aborted) {
      const call = this.#client.KeepAlive();
      this.#call = call;
      await this.#touchOn(call);
      call.cancel();
      await nap(Math.min(500, this.#ttl / 20), this.lost);
    }
  }

  /** Touches the lease on one stream, until the stream ends or a message has no answer in time. */
  async #touchOn(call) {
    const sent = new Map();
    const over = new AbortController();
    call.on('data', (answer) => {
      const sentAt = sent.get(answer.sequence);
      sent.delete(answer.sequence);
      for (const result of answer.results) this.#receive(result, sentAt);
    });
    call.on('error', () => over.abort());
    call.on('end', () => over.abort());
    // Ends when a message has no answer: this stream may be silently dead, and a new one may work.
    for (let sequence = 1; sent.size === 0 && !over.signal.aborted; sequence += 1) {
      sent.set(String(sequence), performance.now());
      call.write({ leases: [this.#ref()], sequence });
      await nap(this.#ttl / 3, over.signal);
    }
  }

  #receive(result, sentAt) {
    if (result.outcome === 'lost') {
      this.#end(result.lost.reason.replace('LOSS_REASON_', '').toLowerCase());
    } else if (result.outcome === 'kept' && sentAt !== undefined) {
      this.#believe(sentAt + milliseconds(result.kept.remaining));
    }
  }

  /** Aborts `lost` at the deadline, whatever the network does. */
  async #watch() {
    const confirmBy = performance.now() + this.#ttl;
    while (!this.lost.aborted) {
      const left = (this.#deadline ?? confirmBy) - performance.now();
      if (left <= 0) this.#end('no answer from a daemon in time');
      await nap(left, this.lost);
    }
  }

  #believe(until) {
    this.#deadline = Math.max(this.#deadline ?? 0, until - this.#margin);
    if (this.remaining > 0) this.#confirm();
  }

  #end(reason) {
    if (this.lost.aborted) return;
    this.#lost.abort(new Lost(reason));
    this.#confirm();
    this.#call?.cancel();
  }

  #unary(method, request, timeout, signal) {
    return new Promise((resolve, reject) => {
      const answered = (error, answer) => {
        signal?.removeEventListener('abort', cancel);
        if (error) reject(error);
        else resolve(answer);
      };
      const metadata = new grpc.Metadata();
      if (this.#unanswered) metadata.set('grpc-previous-rpc-attempts', '1'); // as gRPC's own retries do
      const call = this.#client[method](request, metadata, { deadline: Date.now() + timeout }, answered);
      const cancel = () => call.cancel();
      signal?.addEventListener('abort', cancel);
    });
  }

  #ref() {
    return { key: this.key, leaseId: this.#id };
  }
}

/** Sleeps for `time`, or until the signal is aborted. */
async function nap(time, signal) {
  await sleep(time, undefined, { signal }).catch(() => {});
}

function duration(time) {
  const seconds = Math.floor(time / 1_000);
  return { seconds, nanos: Math.floor((time - seconds * 1_000) * 1e6) };
}

function milliseconds(duration) {
  return Number(duration.seconds) * 1_000 + duration.nanos / 1e6;
}
