//! The gRPC API of leased: messages, client and server stubs, and the meaning of its errors.
//!
//! Independent of the daemon and the client.

/// Why a call was refused, and the status that says so.
mod reason;
/// The codec of the generated stubs.
mod codec;

pub use codec::SmallBuffers;
pub use reason::Reason;

/// The API itself, generated from `proto/leased/v1/lease.proto`.
#[allow(
    missing_docs,
    clippy::allow_attributes_without_reason,
    reason = "generated; documented in the .proto file"
)]
pub mod v1 {
    tonic::include_proto!("leased.v1");
}

/// The API's encoded `FileDescriptorSet`, imports included, for server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
