//! Connections, and the layers around every call.

/// Serves connections, and bounds their number, how long they may be silent and how long a drain
/// waits for them.
pub(crate) mod listener;
/// Accepts connections, and sends responses that are ready together in one write.
pub(crate) mod accept;
/// The layer that counts and times calls.
pub(crate) mod metrics_layer;
/// The layer that adds the store's identity to every response.
pub(crate) mod store_id_layer;
/// The layer that gives each call its deadline and contains its panics.
pub(crate) mod bounds;
/// Bounds the size and time of a request while it arrives.
pub(crate) mod receiving;
/// Bounds the memory and time of a response while it is sent.
pub(crate) mod sending;
/// Calls the lease service without tonic's router.
pub(crate) mod direct_route;
