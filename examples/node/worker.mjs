// A worker: waits for a key, works while it holds the lease, and releases the lease.
//
// node worker.mjs KEY [--seconds N] [--endpoint HOST:PORT] [--ttl SECONDS] [--wait SECONDS]
//
// Exits with 0 when the work is done or was interrupted, 69 if no daemon answers, 73 if the lease
// was lost, and 75 if another client holds the key. At the start it waits 5 s for a daemon. While
// it waits for the key, it repeats failed calls for as long as it may wait.

import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';

import { connect, Held, Lease, Lost } from './leased-lease.mjs';

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    seconds: { type: 'string', default: '15' }, // how long the work takes
    endpoint: { type: 'string', default: '127.0.0.1:5327' }, // the daemon's address
    ttl: { type: 'string', default: '10' }, // the lease's TTL in seconds
    wait: { type: 'string', default: '60' }, // how long to wait at most, in seconds
  },
});
if (positionals.length !== 1) {
  console.error('usage: node worker.mjs KEY [--seconds N] [--endpoint HOST:PORT] [--ttl SECONDS] [--wait SECONDS]');
  process.exit(2);
}

// Also accepts a URL, as leasectl does.
const endpoint = values.endpoint.replace(/^http:\/\/|\/$/g, '');
const client = connect(endpoint);
const lease = new Lease(client, positionals[0], {
  owner: `worker.mjs:${process.pid}`,
  ttl: 1_000 * values.ttl,
  wait: 1_000 * values.wait,
});

let interrupted = false;
for (const name of ['SIGINT', 'SIGTERM']) {
  process.once(name, () => {
    interrupted = true;
    lease.close();
  });
}

const code = await run();
client.close();
// Ends the process at once, even if gRPC still has a timer that waits for a connection.
process.exit(code);

async function run() {
  let code = 0;
  try {
    // `acquire` would try for as long as it may wait, so report a missing daemon now.
    await connected(5_000);
    const token = await lease.acquire();
    console.log(`holding ${lease.key} with fencing token ${token}`);
    // The work goes here. It sends the token with every write, and stops when the lease is lost.
    await sleep(1_000 * values.seconds, undefined, { signal: lease.lost }).catch(() => lease.lost.throwIfAborted());
  } catch (error) {
    if (error instanceof Held) {
      console.log(`not granted: ${error.message}`);
      return 75;
    }
    if (!(error instanceof Lost)) {
      console.log(`failed: ${error.details ?? error.message}`);
      code = 69;
    } else if (!interrupted) {
      console.log(`lost: ${error.message}`);
      code = 73;
    }
  }
  if (await lease.release()) console.log('released');
  return code;
}

/** Waits for a connection to a daemon. Throws after `timeout`, or if the lease is closed. */
function connected(timeout) {
  return new Promise((resolve, reject) => {
    lease.lost.addEventListener('abort', () => reject(lease.lost.reason));
    client.waitForReady(Date.now() + timeout, (error) => {
      if (error) reject(new Error(`no daemon answers at ${endpoint}`));
      else resolve();
    });
  });
}
