// The store, as a runner sees it: one method per RPC, with deadlines, and with retries that have no second effect.

import { randomUUID } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const PROTOS = fileURLToPath(new URL('../../protos', import.meta.url));
const RETRY_DELAYS_MS = [100, 1000, 2000, 5000];
const DEADLINE_MS = 10_000;

/** Whether a call did not get through, or its answer was lost. */
export function isWorthAnotherTry({ code }) {
  return code === grpc.status.UNAVAILABLE || code === grpc.status.DEADLINE_EXCEEDED;
}

function loadService() {
  const definition = protoLoader.loadSync('lightningpb/v1/store_service.proto', {
    includeDirs: [PROTOS],
    keepCase: true, // fields are called what the .proto files call them
    enums: String,
    longs: Number,
    defaults: true,
    oneofs: true,
  });
  return grpc.loadPackageDefinition(definition).lightningpb.v1.LightningStoreService;
}

export class Store {
  /**
   * @param {string} address HOST:PORT
   * @param {object} [options]
   * @param {string} [options.token] A token with the role "runner", where the server asks for one.
   * @param {Buffer} [options.ca] The certificate of the server's authority: connect by TLS.
   */
  constructor(address, { token, ca } = {}) {
    const Service = loadService();
    const credentials = ca ? grpc.credentials.createSsl(ca) : grpc.credentials.createInsecure();
    this.metadata = new grpc.Metadata();
    if (token) this.metadata.set('authorization', `Bearer ${token}`);
    this.client = new Service(address, credentials, {
      'grpc.max_receive_message_length': -1,
      'grpc.keepalive_time_ms': 20_000,
      'grpc.max_reconnect_backoff_ms': 5000,
    });
  }

  /**
   * Makes a call that changes something, and repeats it with the same request_id while the server is away: the server
   * answers a repeat with the outcome of the first.
   *
   * @param {string} method The name of the RPC.
   * @param {object} request Its request.
   * @param {object} [options]
   * @param {number} [options.waitMs] How long the server may take to answer beside the usual.
   */
  async call(method, request, { waitMs = 0 } = {}) {
    const repeatable = { request_id: randomUUID(), ...request };
    for (let tries = 0; ; tries += 1) {
      try {
        return await this.callOnce(method, repeatable, DEADLINE_MS + waitMs);
      } catch (error) {
        const delay = RETRY_DELAYS_MS[tries];
        if (delay === undefined || !isWorthAnotherTry(error)) throw error;
        await new Promise((resolve) => setTimeout(resolve, delay));
      }
    }
  }

  callOnce(method, request, deadlineMs) {
    return new Promise((resolve, reject) => {
      const options = { deadline: Date.now() + deadlineMs };
      this.client[method](request, this.metadata, options, (error, response) => {
        if (error) reject(error);
        else resolve(response);
      });
    });
  }

  /** The stream of heartbeats up and commands down. */
  workerSession() {
    return this.client.WorkerSession(this.metadata);
  }

  close() {
    this.client.close();
  }
}
