//! An S3 server for tests: s3s speaks the protocol and checks signatures, s3s-fs keeps objects as files of a directory.
//!
//!     memdev-s3-server PORT DIRECTORY KEY_ID SECRET
//!
//! s3s-fs takes a directory of its own for an object, and keeps nothing of an object whose key ends with a slash; here such an
//! object is the file `%` in that directory, and directories are none.

use std::path::PathBuf;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::dto::*;
use s3s::service::S3ServiceBuilder;
use s3s::{S3, S3Request, S3Response, S3Result, s3_error};
use s3s_fs::FileSystem;

/// What `DIRECTORY/` is called in that directory.
const OWN: &str = "%";

struct Server {
    files: FileSystem,
    root: PathBuf,
}

fn inner(key: &str) -> String {
    if key.ends_with('/') { format!("{key}{OWN}") } else { key.to_owned() }
}

fn outer(key: &str) -> String {
    key.strip_suffix(OWN).filter(|rest| rest.ends_with('/')).unwrap_or(key).to_owned()
}

impl Server {
    fn path(&self, bucket: &str, key: &str) -> PathBuf {
        self.root.join(bucket).join(key)
    }

    /// Where a directory is there is no object.
    fn check(&self, bucket: &str, key: &str) -> S3Result<()> {
        if self.path(bucket, key).is_dir() { Err(s3_error!(NoSuchKey)) } else { Ok(()) }
    }
}

#[async_trait::async_trait]
impl S3 for Server {
    async fn put_object(&self, mut req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        req.input.key = inner(&req.input.key);
        self.files.put_object(req).await
    }

    async fn get_object(&self, mut req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        req.input.key = inner(&req.input.key);
        self.check(&req.input.bucket, &req.input.key)?;
        self.files.get_object(req).await
    }

    async fn head_object(&self, mut req: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        req.input.key = inner(&req.input.key);
        self.check(&req.input.bucket, &req.input.key)?;
        self.files.head_object(req).await
    }

    async fn copy_object(&self, mut req: S3Request<CopyObjectInput>) -> S3Result<S3Response<CopyObjectOutput>> {
        req.input.key = inner(&req.input.key);
        if let CopySource::Bucket { key, .. } = &mut req.input.copy_source {
            *key = inner(key).into();
        }
        self.files.copy_object(req).await
    }

    async fn delete_object(
        &self,
        mut req: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        req.input.key = inner(&req.input.key);
        let (bucket, key) = (req.input.bucket.clone(), req.input.key.clone());
        let answer = self.files.delete_object(req).await?;
        // What is empty now goes.
        let path = self.path(&bucket, &key);
        for above in path.ancestors().skip(1).take_while(|above| *above != self.root.join(&bucket)) {
            if std::fs::remove_dir(above).is_err() {
                break;
            }
        }
        Ok(answer)
    }

    async fn list_objects_v2(
        &self,
        req: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let mut answer = self.files.list_objects_v2(req).await?;
        for object in answer.output.contents.iter_mut().flatten() {
            object.key = object.key.as_deref().map(outer);
        }
        Ok(answer)
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        self.files.create_multipart_upload(req).await
    }

    async fn upload_part(&self, req: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        self.files.upload_part(req).await
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        self.files.complete_multipart_upload(req).await
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        self.files.abort_multipart_upload(req).await
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [port, root, key_id, secret] = &arguments[..] else {
        return Err("usage: memdev-s3-server PORT DIRECTORY KEY_ID SECRET".into());
    };
    let files = FileSystem::new(root).map_err(|error| format!("{root}: {error:?}"))?;
    let mut builder = S3ServiceBuilder::new(Server { files, root: root.into() });
    builder.set_auth(SimpleAuth::from_single(key_id.clone(), secret.clone()));
    let service = builder.build();
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port.parse()?)).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        let service = service.clone();
        tokio::spawn(async move {
            let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
        });
    }
}
