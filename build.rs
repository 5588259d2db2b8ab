//! Compiles the API from `proto/`, without `protoc`.

use std::error::Error;
use std::path::PathBuf;
use std::{env, fs};

use prost::Message;

const API: &str = "leased/v1/lease.proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto/{API}");
    let mut compiler = protox::Compiler::new(["proto"])?;
    // The source info has the comments, which become the doc comments of the generated code.
    compiler.include_imports(true).include_source_info(true).open_file(API)?;
    let descriptors = compiler.file_descriptor_set();

    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().codec_path("crate::codec::SmallBuffers").compile_fds(descriptors)?;
    Ok(())
}
