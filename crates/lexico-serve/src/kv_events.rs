//! Events of kept prefixes for routers, in vLLM's format over ZMQ.
//!
//! A message has three frames: the topic, empty here; its number, eight bytes, the highest first; and a MessagePack array
//! of the time in seconds, the events, and the rank, 0. Events are maps, as `vllm-router` reads them. A block is a chunk
//! of a prompt, of `--ubatch-size` tokens. The medium is null for memory, where texts begin from it at once, `DISK` for a prefix
//! store in a folder and `EXTERNAL` for one elsewhere. (vLLM: `vllm/distributed/kv_events.py`.)

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use zeromq::{PubSocket, Socket, SocketSend, ZmqMessage};

use crate::prefix::Key;

/// An event; the fields that are always null are what routers insist on.
#[derive(Debug, Serialize)]
#[serde(tag = "type")]
pub(crate) enum KvEvent {
    BlockStored {
        block_hashes: [u64; 1],
        parent_block_hash: Option<u64>,
        token_ids: Vec<u32>,
        block_size: usize,
        lora_id: Option<u32>,
        lora_name: Option<String>,
        medium: Option<&'static str>,
        extra_keys: Option<Vec<String>>,
        group_idx: Option<u32>,
        kv_cache_spec_kind: Option<String>,
        kv_cache_spec_sliding_window: Option<u32>,
    },
    BlockRemoved {
        block_hashes: [u64; 1],
        medium: Option<&'static str>,
        group_idx: Option<u32>,
    },
}

impl KvEvent {
    pub(crate) fn stored(
        key: Key,
        parent: Option<Key>,
        tokens: &[u32],
        medium: Option<&'static str>,
    ) -> Self {
        Self::BlockStored {
            block_hashes: [key.short()],
            parent_block_hash: parent.map(Key::short),
            token_ids: tokens.to_vec(),
            block_size: tokens.len(),
            lora_id: None,
            lora_name: None,
            medium,
            extra_keys: None,
            group_idx: None,
            kv_cache_spec_kind: None,
            kv_cache_spec_sliding_window: None,
        }
    }

    pub(crate) fn removed(key: Key, medium: Option<&'static str>) -> Self {
        Self::BlockRemoved {
            block_hashes: [key.short()],
            medium,
            group_idx: None,
        }
    }
}

/// Where events go.
#[derive(Clone)]
pub(crate) struct KvEvents {
    events: UnboundedSender<KvEvent>,
    endpoint: String,
}

impl KvEvents {
    /// Publishes events on this endpoint, `tcp://127.0.0.1:5557` say, while the runtime that this is called in lives.
    pub(crate) async fn bind(endpoint: &str) -> Result<Self, String> {
        let mut socket = PubSocket::new();
        let bound = socket.bind(endpoint).await.map_err(|e| e.to_string())?;
        let (events, receiver) = unbounded_channel();
        tokio::spawn(publish(socket, receiver));
        let endpoint = bound.to_string();
        Ok(Self { events, endpoint })
    }

    /// Where they are published, with the port where any was asked for.
    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(crate) fn publish(&self, event: KvEvent) {
        // Nobody is left to be told where the server ends.
        let _ = self.events.send(event);
    }
}

async fn publish(mut socket: PubSocket, mut events: UnboundedReceiver<KvEvent>) {
    const AT_ONCE: usize = 64;
    let mut number = 0u64;
    let mut batch = Vec::new();
    while events.recv_many(&mut batch, AT_ONCE).await > 0 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let seconds = now.map_or(0.0, |now| now.as_secs_f64());
        let Ok(payload) = rmp_serde::to_vec_named(&(seconds, &batch, 0)) else {
            continue;
        };
        batch.clear();
        let mut message = ZmqMessage::from(Vec::new());
        message.push_back(number.to_be_bytes().to_vec().into());
        message.push_back(payload.into());
        number += 1;
        if let Err(error) = socket.send(message).await {
            tracing::warn!(%error, "an event of the KV cache was not sent");
        }
    }
}
