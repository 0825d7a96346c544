# Two buckets, one key, the role of those who impute, and a queue that tells of new shards. The network, the Kubernetes cluster and the
# database are the site's own.
terraform {
  required_version = ">= 1.9"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 6.0"
    }
  }
}

data "aws_caller_identity" "current" {}

locals {
  raw      = "${var.name}-raw"
  enriched = "${var.name}-enriched"
  account  = data.aws_caller_identity.current.account_id
}
